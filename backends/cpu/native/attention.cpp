#include "attention.h"

#include <algorithm>

#include "isa.h"
#include "kernels/attention.h"
#include "stop.h"

namespace tp {
namespace {

constexpr int kTaskQueries = 48;    // enough to read keys and values seldom, few enough for the second-level cache
constexpr int kTasksPerThread = 3;  // with fewer, tasks are cut into spans
constexpr int kRunsPerThread = 6;   // runs of spans, then
constexpr int kWriteTokens = 16;

int task_tokens(const tp_attention& layer) { return std::max(1, kTaskQueries / group_heads(layer)); }

// The tasks of a step, numbered; each thread asks for rising numbers.
class Tasks {
 public:
  Tasks(const tp_attention& layer, const tp_attention_rows& rows, const tp_token_rows& query, const tp_token_rows& out)
      : layer_(layer), rows_(rows), query_(query), out_(out), tokens_(task_tokens(layer)) {
    for (int row = 0; row < rows.rows; ++row) count_ += of_row(row);
  }

  int count() const { return count_; }

  AttentionTask get(int number) {
    while (number >= first_ + of_row(row_)) first_ += of_row(row_++);
    const int block = (number - first_) / layer_.kv_heads, done = block * tokens_;
    AttentionTask task{&layer_, table(), (number - first_) % layer_.kv_heads, rows_.context_lens[row_] + done,
                       std::min(tokens_, of(row_) - done), query_, out_};
    const int64_t token = rows_.first_tokens[row_] + done;
    advance(task.query, token), advance(task.out, token);
    return task;
  }

 private:
  int of(int row) const { return rows_.num_tokens ? rows_.num_tokens[row] : 1; }
  int of_row(int row) const { return (of(row) + tokens_ - 1) / tokens_ * layer_.kv_heads; }

  const int32_t* table() const {
    return rows_.tables + int64_t(rows_.slots ? rows_.slots[row_] : row_) * rows_.table_stride;
  }

  static void advance(tp_token_rows& rows, int64_t tokens) {
    rows.data = static_cast<uint8_t*>(rows.data) + tokens * rows.stride * int64_t(element_bytes(rows.type));
  }

  const tp_attention& layer_;
  const tp_attention_rows& rows_;
  const tp_token_rows query_, out_;
  const int tokens_;
  int count_ = 0, row_ = 0, first_ = 0;
};

// Memory of a step: for each thread scratch and the states of a task; then the states of each span of each task.
struct Workspace {
  size_t scratch, state;
  uint8_t* memory;

  Workspace(const tp_attention& layer, void* memory) : memory(static_cast<uint8_t*>(memory)) {
    const int queries = task_tokens(layer) * group_heads(layer);
    scratch = kernels().attention->scratch_bytes(layer, queries);
    state = size_t(queries) * state_floats(layer) * sizeof(float);
  }

  void* scratch_of(int thread) const { return memory + thread * (scratch + state); }
  float* states_of(int thread) const { return reinterpret_cast<float*>(memory + thread * (scratch + state) + scratch); }
  float* states_of_span(int threads, int number) const {
    return reinterpret_cast<float*>(memory + threads * (scratch + state) + number * state);
  }
};

void attend_whole(Team& team, Tasks& tasks, const Workspace& workspace) {
  const AttentionKernels& kernel = *kernels().attention;
  float* states = workspace.states_of(team.thread);
  team.share(tasks.count(), [&](int number) {
    const AttentionTask task = tasks.get(number);
    kernel.clear(task, states);
    kernel.attend(task, first_span(task), last_span(task), states, workspace.scratch_of(team.thread));
    kernel.finish(task, states);
  });
}

// For few tasks with long contexts: every span by itself, then the results of each task in the order of its spans.
void attend_in_spans(Team& team, const Tasks& tasks, int spans, const Workspace& workspace) {
  const AttentionKernels& kernel = *kernels().attention;
  Tasks here = tasks, there = tasks;
  const int run = std::max(1, tasks.count() * spans / (kRunsPerThread * team.threads)), runs = (spans + run - 1) / run;
  team.share(tasks.count() * runs, [&](int number) {
    const AttentionTask task = here.get(number / runs);
    const int begin = number % runs * run, end = std::min(begin + run, last_span(task));
    for (int span = std::max(begin, first_span(task)); span < end; ++span) {
      float* states = workspace.states_of_span(team.threads, number / runs * spans + span);
      kernel.clear(task, states);
      kernel.attend(task, span, span + 1, states, workspace.scratch_of(team.thread));
    }
  });
  team.share(tasks.count(), [&](int number) {
    const AttentionTask task = there.get(number);
    const int first = first_span(task);
    float* states = workspace.states_of_span(team.threads, number * spans + first);
    for (int span = first + 1; span < last_span(task); ++span)
      kernel.fold(task, states, workspace.states_of_span(team.threads, number * spans + span));
    kernel.finish(task, states);
  });
}

int most_spans(const tp_attention_rows& rows) {
  int most = 0;
  for (int row = 0; row < rows.rows; ++row)
    most = std::max(most, rows.context_lens[row] + (rows.num_tokens ? rows.num_tokens[row] : 1));
  return (most + kSpanKeys - 1) / kSpanKeys;
}

bool few(int tasks, int threads) { return threads > 1 && tasks < kTasksPerThread * threads; }

}  // namespace

bool is_attention(const tp_attention& layer) {
  return layer.kv_heads > 0 && layer.heads > 0 && layer.heads % layer.kv_heads == 0 && layer.key_dim > 0 &&
         layer.value_dim > 0 && layer.window >= 0 &&
         (layer.type == TP_F32 || layer.type == TP_BF16 || layer.type == TP_INT8);
}

size_t key_block_bytes(const tp_attention& layer) { return key_head_bytes(layer) * layer.kv_heads; }

size_t value_block_bytes(const tp_attention& layer) { return value_head_bytes(layer) * layer.kv_heads; }

void write_kv(Team& team, const tp_attention& layer, const tp_token_rows& keys, const tp_token_rows& values,
              const int64_t* index, int tokens) {
  const AttentionKernels& kernel = *kernels().attention;
  team.share((tokens + kWriteTokens - 1) / kWriteTokens, [&](int part) {
    const int end = std::min(tokens, (part + 1) * kWriteTokens);
    for (int token = part * kWriteTokens; token < end; ++token) kernel.write(layer, index[token], keys, values, token);
  });
}

size_t attention_workspace_bytes(const tp_attention& layer, int most_keys, int threads) {
  const Workspace one(layer, nullptr);
  const size_t spans = (size_t(most_keys) + kSpanKeys - 1) / kSpanKeys;
  const size_t parts = threads > 1 ? kTasksPerThread * threads * spans : 0;
  return threads * (one.scratch + one.state) + parts * one.state;
}

void attend(Team& team, const tp_attention& layer, const tp_attention_rows& rows, const tp_token_rows& query,
            const tp_token_rows& out, void* workspace) {
  Tasks tasks(layer, rows, query, out);
  const Workspace memory(layer, workspace);
  const int spans = few(tasks.count(), team.threads) ? most_spans(rows) : 1;
  if (spans > 1) attend_in_spans(team, tasks, spans, memory);
  else attend_whole(team, tasks, memory);
}

}  // namespace tp

extern "C" {

TP_API size_t tp_key_block_bytes(const tp_attention* layer) { return tp::key_block_bytes(*layer); }

TP_API size_t tp_value_block_bytes(const tp_attention* layer) { return tp::value_block_bytes(*layer); }

TP_API size_t tp_attention_workspace_bytes(const tp_attention* layer, int most_keys) {
  return tp::attention_workspace_bytes(*layer, most_keys, tp::pool().size());
}

TP_API void tp_write_kv(const tp_attention* layer, const tp_token_rows* keys, const tp_token_rows* values,
                        const int64_t* index, int tokens) {
  tp::pool().run([&](tp::Team& team) { tp::write_kv(team, *layer, *keys, *values, index, tokens); });
}

TP_API void tp_attend(const tp_attention* layer, const tp_attention_rows* rows, const tp_token_rows* query,
                      const tp_token_rows* out, void* workspace) {
  tp::require(tp::is_attention(*layer), "tp_attend", "heads are no multiple of KV heads, or no cache has the type");
  tp::pool().run([&](tp::Team& team) { tp::attend(team, *layer, *rows, *query, *out, workspace); });
}
}
