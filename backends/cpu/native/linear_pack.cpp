// Packs matrices into the layout of kernels/linear.h, quantizing them where that is asked.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "kernels/linear.h"
#include "linear.h"
#include "stop.h"
#include "tokenplane_cpu.h"

namespace tp {
namespace {

uint8_t* block_values(const tp_linear_weight& w, int block) {
  return static_cast<uint8_t*>(w.values) + block * block_bytes(w);
}

// Writes input k of column c (of 32) into a block; value: as the type stores it.
void put_int8(uint8_t* block, int c, int k, int value) {
  const int half = c / kHalfColumns, lane = c % kHalfColumns / 4;
  block[k / 2 * 64 + lane * 16 + half * 8 + c % 4 * 2 + k % 2] = uint8_t((value < 0 ? 0x80 : 0) | std::abs(value));
}

void put_int4(uint8_t* block, int c, int k, int value) {
  uint16_t word;
  uint8_t* at = block + k / 4 * 64 + (c % kHalfColumns * 2 + k % 2) * 2;
  memcpy(&word, at, 2);
  const int shift = k / 2 % 2 * 8 + c / kHalfColumns * 4;
  word = uint16_t((word & ~(15 << shift)) | (value + kInt4Zero) << shift);
  memcpy(at, &word, 2);
}

// A scale for values [count], so that value / scale rounds to an integer of the type.
float scale_of(const float* values, int count, int type) {
  float largest = 0;
  for (int i = 0; i < count; ++i)
    if (fabsf(values[i]) > fabsf(largest)) largest = values[i];
  return type == TP_INT8 ? fabsf(largest) / 127 : largest / -8;
}

int quantized(float value, float scale, int type) {
  const int most = type == TP_INT8 ? 127 : 7, least = type == TP_INT8 ? -127 : -8;
  return scale == 0 ? 0 : std::max(least, std::min(most, int(lrintf(value / scale))));
}

void pack_quantized(const tp_linear_weight& w, int column, const float* row) {
  const int block = column / kBlockColumns, c = column % kBlockColumns, group = w.group ? w.group : w.inputs;
  for (int first = 0, g = 0; first < w.inputs; first += group, ++g) {
    const int count = std::min(group, w.inputs - first);
    float scale = scale_of(row + first, count, w.type);
    if (w.scales) {
      uint16_t& stored = w.scales[(size_t(block) * input_groups(w) + g) * kBlockColumns + c];
      stored = to_bf16(scale);
      scale = from_bf16(stored);
    } else {
      w.output_scales[column] = scale;
    }
    for (int k = first; k < first + count; ++k) {
      const int value = quantized(row[k], scale, w.type);
      if (w.type == TP_INT8) put_int8(block_values(w, block), c, k, value);
      else put_int4(block_values(w, block), c, k, value);
    }
  }
}

void pack_plain(const tp_linear_weight& w, int column, const float* row) {
  const int c = column % kBlockColumns;
  uint8_t* block = block_values(w, column / kBlockColumns);
  for (int k = 0; k < w.inputs; ++k) {
    const size_t at = plain_place(w, c, k);
    if (w.type == TP_F32) reinterpret_cast<float*>(block)[at] = row[k];
    else reinterpret_cast<uint16_t*>(block)[at] = to_bf16(row[k]);
  }
}

// Where scales and bias begin in a packed weight's memory, and its size.
struct Parts {
  size_t scales, bias, end;
};

Parts parts_of(const tp_linear_weight& w) {
  const size_t values = size_t(column_blocks(w)) * block_bytes(w), columns = size_t(column_blocks(w)) * kBlockColumns;
  const size_t scales = !is_quantized(w) ? 0 : w.group ? columns * input_groups(w) * 2 : columns * 4;
  return {values, values + scales, values + scales + columns * 4};
}

tp_linear_weight described(int type, int outputs, int inputs, int group, int gated) {
  tp_linear_weight w = {};
  w.type = type;
  w.outputs = outputs;
  w.inputs = inputs;
  w.group = group;
  w.gated = gated;
  require(type == TP_F32 || type == TP_BF16 || is_quantized(w), "a packed weight", "of no type that it may have");
  require(outputs > 0 && inputs > 0, "a packed weight", "without outputs or inputs");
  require(group >= 0 && group % kInputPadding == 0, "a packed weight", "group is no multiple of 32");
  require(!gated || outputs % 2 == 0, "a packed weight", "gated, and an odd number of outputs");
  return w;
}

}  // namespace

size_t linear_packed_bytes(const tp_linear_weight& weight) { return parts_of(weight).end; }

}  // namespace tp

extern "C" {

TP_API size_t tp_linear_packed_bytes(int type, int outputs, int inputs, int group, int gated) {
  return tp::linear_packed_bytes(tp::described(type, outputs, inputs, group, gated));
}

TP_API void tp_linear_prepare(tp_linear_weight* weight, void* memory, int type, int outputs, int inputs, int group,
                              int gated) {
  *weight = tp::described(type, outputs, inputs, group, gated);
  const tp::Parts parts = tp::parts_of(*weight);
  char* at = static_cast<char*>(memory);
  weight->values = at;
  if (!tp::is_quantized(*weight)) return;
  if (group) weight->scales = reinterpret_cast<uint16_t*>(at + parts.scales);
  else weight->output_scales = reinterpret_cast<float*>(at + parts.scales);
}

TP_API void tp_linear_pack(tp_linear_weight* weight, int first, int count, const void* source, const void* bias,
                           int source_type) {
  tp::require(first >= 0 && count >= 0 && count <= weight->outputs - first, "tp_linear_pack",
              "outputs that the weight does not have");
  std::vector<float> row(weight->inputs);
  if (bias && !weight->bias)
    weight->bias = reinterpret_cast<float*>(static_cast<char*>(weight->values) + tp::parts_of(*weight).bias);
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < weight->inputs; ++k)
      row[k] = tp::element(source, source_type, size_t(i) * weight->inputs + k);
    const int column = tp::column_of(*weight, first + i);
    if (tp::is_quantized(*weight)) tp::pack_quantized(*weight, column, row.data());
    else tp::pack_plain(*weight, column, row.data());
    if (bias) weight->bias[column] = tp::element(bias, source_type, i);
  }
}
}
