// The C interface: all that Python calls. Plain pointers, sizes and structs, so that it needs no headers of anyone's.
//
// Functions compute with the threads of tp_set_threads and may not be called by two threads at once. Unless said
// otherwise arrays are dense and row-major; bf16 is passed as uint16_t. Sizes that contradict each other stop the
// process with a message.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define TP_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// The number of this interface, which Python compares with its own before anything else (native.py). It goes up with
// every change of a struct's layout or of a function's parameters.
enum { TP_ABI = 3 };
TP_API int tp_abi(void);

// Best tier of instruction sets that this machine and operating system can run: "generic", "avx2", "avx512",
// "avx512_bf16" or "amx".
TP_API const char* tp_best_isa(void);

// The tier in use; at first the best one.
TP_API const char* tp_isa(void);

// Use another tier, for tests. 0, or -1 if this machine cannot run it or does not know it.
TP_API int tp_set_isa(const char* name);

// Compute with that many threads, the caller's included, on whichever CPUs the system places them. Ends the threads of
// an earlier call. Where the system gives no more threads, the process stops with a message.
TP_API void tp_set_threads(int threads);

// --- Linear layers (linear.h) ---------------------------------------------------------------------------------------

enum { TP_F32 = 0, TP_BF16 = 1, TP_INT8 = 2, TP_INT4 = 3, TP_F16 = 4 };  // element types
enum { TP_STORE = 0, TP_ADD = 1, TP_GATED = 2 };                         // epilogues
enum { TP_SILU = 0, TP_GELU = 1, TP_GELU_TANH = 2 };                     // activations

// A packed weight. Quantized ones are symmetric: weight = value * scale, with a scale for each output and group.
typedef struct {
  void* values;
  uint16_t* scales;      // bf16, or null where the weight is not quantized in groups
  float* output_scales;  // for each output, where it is quantized and has no groups; or null
  float* bias;           // or null
  int32_t type;          // TP_F32, TP_BF16, TP_INT8 or TP_INT4
  int32_t outputs;       // of the matrix: a gated weight has the gate's and the up projection's
  int32_t inputs;
  int32_t group;         // inputs that share a scale, a multiple of 32; 0: all of them
  int32_t gated;         // outputs [0, outputs/2) are the gate's, the others the up projection's
} tp_linear_weight;

// What becomes of a row's sums. stride: elements between the beginnings of two rows.
typedef struct {
  void* data;  // TP_STORE, TP_ADD: float. TP_GATED: float for weights of floats, else bf16, [rows, outputs / 2]
  int64_t stride;
  int32_t epilogue;  // TP_STORE: =; TP_ADD: +=; TP_GATED: activation(gate) * up, for gated weights and only for them
  int32_t activation;
} tp_linear_output;

// Bytes of memory, 64-byte aligned, that hold a packed weight with its scales and bias.
TP_API size_t tp_linear_packed_bytes(int type, int outputs, int inputs, int group, int gated);

// Fills *weight with pointers into memory, which is the caller's and all zeros.
TP_API void tp_linear_prepare(tp_linear_weight* weight, void* memory, int type, int outputs, int inputs, int group,
                              int gated);

// Packs outputs [first, first + count) from source [count, inputs] and their bias [count], or null, of type TP_F32,
// TP_BF16 or TP_F16. So several matrices become one. Outputs not packed give 0. Different outputs may be packed by
// several threads at once, except that blocks of 32 outputs (16 of each half if gated) belong to one call.
TP_API void tp_linear_pack(tp_linear_weight* weight, int first, int count, const void* source, const void* bias,
                           int source_type);

// Bytes that tp_linear needs as workspace for that many rows, 64-byte aligned. May be 0.
TP_API size_t tp_linear_workspace_bytes(const tp_linear_weight* weight, int rows);

// out = epilogue(input x weight^T + bias). input: [rows, weight->inputs], float for weights of floats and bf16 for all
// others; input_stride: elements between the beginnings of two rows.
TP_API void tp_linear(const tp_linear_weight* weight, const void* input, int64_t input_stride, int rows,
                      const tp_linear_output* out, void* workspace);

// --- Attention over the paged cache (attention.h) --------------------------------------------------------------------

enum { TP_KV_BLOCK_TOKENS = 32 };

// What a step has for each token, stride elements apart.
typedef struct {
  void* data;
  int64_t stride;
  int32_t type;  // TP_F32 or TP_BF16
} tp_token_rows;

// One layer's attention and its cache.
typedef struct {
  void* keys;    // [blocks] of tp_key_block_bytes
  void* values;  // [blocks] of tp_value_block_bytes
  const float* sinks;  // [heads], or null: one extra score per head that takes weight and gives no value
  float scaling;
  float softcap;   // 0: none. Else scores become softcap * tanh(score / softcap)
  int32_t window;  // 0: none. Else a query at position p sees keys from position p - window + 1 on
  int32_t type;    // of the cache: TP_F32, TP_BF16 or TP_INT8
  int32_t heads;
  int32_t kv_heads;
  int32_t key_dim;
  int32_t value_dim;
} tp_attention;

// Rows of new tokens. Row i has its tokens back to back; its keys are those of context_lens[i] cached tokens and those
// of its own.
typedef struct {
  const int32_t* first_tokens;  // [rows] where a row's first token lies among the step's
  const int32_t* num_tokens;    // [rows]; null: one each
  const int32_t* context_lens;  // [rows]
  const int32_t* tables;        // block ids; row i's are table number slots[i]
  const int32_t* slots;         // [rows]; null: table i is row i's
  int32_t table_stride;
  int32_t rows;
} tp_attention_rows;

// What each does: the function of its name in attention.h.
TP_API size_t tp_key_block_bytes(const tp_attention* layer);
TP_API size_t tp_value_block_bytes(const tp_attention* layer);
TP_API size_t tp_attention_workspace_bytes(const tp_attention* layer, int most_keys);
TP_API void tp_write_kv(const tp_attention* layer, const tp_token_rows* keys, const tp_token_rows* values,
                        const int64_t* index, int tokens);
TP_API void tp_attend(const tp_attention* layer, const tp_attention_rows* rows, const tp_token_rows* query,
                      const tp_token_rows* out, void* workspace);

// --- Sampling (sampling.h) ------------------------------------------------------------------------------------------

enum { TP_MOST_LOGPROBS = 1024 };

// Rows to draw a token for; the meaning of each field is that of tokenplane_core's SamplingBatch. Pointers that are
// null stand for a feature that no row uses. Biased and former ids that the vocabulary lacks count for nothing.
typedef struct {
  const float* logits;  // [rows, stride]
  int64_t stride;
  int32_t rows;
  int32_t vocab;
  const uint32_t* masks;     // [.., (vocab + 31) / 32] bit t % 32 of word t / 32: id t is allowed
  const int32_t* mask_rows;  // [rows] which of the masks is the row's; -1: none
  const int32_t* bias_starts;  // [rows + 1]
  const int32_t* bias_ids;
  const float* bias_values;
  const float* temperature;  // [rows] 0: the highest logit
  const int32_t* top_k;
  const float* top_p;
  const float* typical_p;
  const float* min_p;
  const float* uniforms;  // [rows] in [0, 1)
  const int32_t* num_logprobs;        // [rows] -1: none; at most TP_MOST_LOGPROBS and width
  const uint8_t* processed_logprobs;  // [rows] 1: of the distribution drawn from
  const float* repetition_penalty;    // [rows]
  const float* presence_penalty;
  const float* frequency_penalty;
  const int32_t* history_rows;     // [rows] which of the histories is the row's; -1: none
  const int32_t* history_ids;      // [.., history_stride] tokens before the one to draw
  const int32_t* history_lengths;
  const int32_t* history_prompts;  // how many of them are the prompt
  int64_t history_stride;
  int32_t* token_ids;    // [rows] out; -1: no id has a finite logit, or one is inf, and nothing could be drawn
  float* logprobs;       // [rows] out; null if no row asks
  int32_t* top_ids;      // [rows, width] out, best first
  float* top_logprobs;   // [rows, width] out
  int32_t width;
} tp_sampling;

// What each does: the function of its name in sampling.h.
TP_API size_t tp_sampling_workspace_bytes(int vocab);
TP_API void tp_sample(const tp_sampling* rows, void* workspace);

// --- A decoder's step (program.h) -----------------------------------------------------------------------------------

// x / sqrt(mean(x^2) + eps) * weight. weight null: there is no norm.
typedef struct {
  const float* weight;
  float eps;
  int32_t size;
} tp_norm;

// Attention and gated MLP, each between a norm of what it takes and a norm of what it gives, added to the residual.
typedef struct {
  tp_attention attention;
  tp_linear_weight qkv, out, gate_up, down;  // gate_up is gated
  tp_norm input_norm, attention_norm, mlp_norm, output_norm;
  tp_norm query_norm, key_norm;  // of one head's size, else of all heads together
  const float* cosines;          // [max_keys, rotary_pairs]
  const float* sines;
  int32_t rotary_pairs;  // at most key_dim / 2; dimension i of a head turns with i + rotary_pairs. 0: none does
} tp_layer;

typedef struct {
  const tp_layer* layers;
  tp_linear_weight head;
  const void* embedding;  // [vocab, hidden]; null: the head's own weight
  tp_norm norm;
  float embedding_scale;
  float residual_scale;  // of what attention and MLP add
  float logit_scale;
  float logit_softcap;     // 0: none
  int32_t embedding_type;  // TP_F32, TP_BF16 or TP_F16
  int32_t activation;
  int32_t num_layers;
  int32_t hidden;
  int32_t max_tokens;  // of a step
  int32_t max_keys;    // of a sequence
} tp_decoder;

// Rows of new tokens, packed back to back. Row i is of the sequence in slots[i] and has context_lens[i] tokens cached.
typedef struct {
  const int32_t* token_ids;     // [tokens]
  const int32_t* slots;         // [rows]
  const int32_t* context_lens;  // [rows]
  const int32_t* num_new;       // [rows]
  const int32_t* wanted;        // [num_wanted] tokens, as indices into token_ids, after which logits may be asked for
  const int32_t* tables;        // block tables of all slots
  float* logits;                // [num_logits, vocab] after the first num_logits of those tokens
  int32_t table_stride;         // blocks in a slot's table
  int32_t tokens;
  int32_t rows;
  int32_t num_wanted;
  int32_t num_logits;
} tp_step;

typedef struct tp_program tp_program;

// What the decoder points to must outlive the program. The process stops with a message where there is no memory or the
// decoder's parts do not fit together.
TP_API tp_program* tp_program_create(const tp_decoder* decoder);
TP_API void tp_program_destroy(tp_program* program);

// Bytes that its largest steps work in, besides the logits. They are taken from the system when first used.
TP_API size_t tp_program_scratch_bytes(const tp_program* program);

// One step: writes keys and values of the new tokens into the cache, and logits. The process stops with a message where
// it has more tokens than max_tokens, or positions beyond max_keys or the tables.
TP_API void tp_program_step(tp_program* program, const tp_step* step);

// Logits [count, vocab] after the tokens wanted[first] and on of the last step.
TP_API void tp_program_logits(tp_program* program, int first, int count, float* logits);

#ifdef __cplusplus
}
#endif
