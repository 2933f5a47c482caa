// Launch shapes of the kernels that every family shares, read by the kernels and by the host.
#pragma once

namespace flash::common {

// A warp takes 32 rows.
constexpr int kDeltaRows = 256;
constexpr int kDeltaThreads = kDeltaRows;

constexpr int kCombineWarps = 4;
constexpr int kCombineThreads = 32 * kCombineWarps;
constexpr int kCombineColumns = 128;  // of a row, that a warp takes
constexpr int kPartsAtOnce = 4;       // on their way to a warp

// A warp takes a row.
constexpr int kAppendRows = 4;
constexpr int kAppendThreads = 32 * kAppendRows;

constexpr int kFillThreads = 256;

// A warp takes 16 rows.
constexpr int kSDmaskRows = 64;
constexpr int kSDmaskThreads = 2 * kSDmaskRows;

}  // namespace flash::common
