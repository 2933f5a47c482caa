// Words of messages, and the shape rule that most checks are.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>

#include "torch/call.h"

namespace flash::shim {

using Shape = std::initializer_list<int64_t>;

inline std::string text(int64_t x) { return std::to_string(x); }

template <class Sizes>
inline std::string tuple_text(const Sizes& sizes) {
  std::string words = "(";
  size_t count = 0;
  for (const int64_t size : sizes) words += (count++ == 0 ? "" : ", ") + text(size);
  return words + (count == 1 ? ",)" : ")");
}

inline std::string dtype_text(const Tensor& x) {
  switch (x.dtype()) {
    case Dtype::kHalf:
      return "torch.float16";
    case Dtype::kBfloat16:
      return "torch.bfloat16";
    case Dtype::kE4m3:
      return "torch.float8_e4m3fn";
    case Dtype::kFloat:
      return "torch.float32";
    case Dtype::kInt:
      return "torch.int32";
    case Dtype::kLong:
      return "torch.int64";
    default:
      return "another dtype";
  }
}

inline std::string device_text(const Tensor& x) { return "cuda:" + text(x.device_index()); }

// As Python writes it: the fewest digits that give the number back, and a point.
inline std::string number_text(double x) {
  char words[40];
  for (int digits = 1; digits <= 17; ++digits) {
    snprintf(words, sizeof(words), "%.*g", digits, x);
    if (std::strtod(words, nullptr) == x) break;
  }
  const std::string text = words;
  return text.find_first_not_of("-0123456789") == std::string::npos ? text + ".0" : text;
}

inline bool has_shape(const Tensor& x, Shape shape) {
  if (x.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t size : shape) {
    if (x.size(i++) != size) return false;
  }
  return true;
}

inline void check_shape(const char* name, const char* argument, const Tensor& x, Shape shape,
                        const char* words) {
  if (!has_shape(x, shape)) {
    fail(name, std::string(argument) + " must have shape " + words + " = " + tuple_text(shape),
         "shape " + shape_text(x));
  }
}

// Shape (rows of q, last), where rows are (b, sq, hq) or (total_q, hq).
inline void check_like_q(const char* name, const char* argument, const Tensor& x, const Tensor& q,
                         int64_t last) {
  constexpr const char* kWords = "(like q, dim of v)";
  if (q.dim() == 3) {
    check_shape(name, argument, x, {q.size(0), q.size(1), last}, kWords);
  } else {
    check_shape(name, argument, x, {q.size(0), q.size(1), q.size(2), last}, kWords);
  }
}

}  // namespace flash::shim
