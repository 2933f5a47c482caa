// How a call is cut into tiles and parts, and in which order these run.
#pragma once

#include "host/driver.h"
#include "host/families.h"

namespace flash::host {

// Query heads of a group that share tiles: all of them, or as many as a tile has room for, where
// queries are so few that tiles of one head would be empty for the most part; else 1. `shape`: of
// who takes the call otherwise.
int choose_heads_of_tile(const ForwardParams& params, const Shape& shape);

// Queries of a tile, of each head that has it.
int queries_of_tile(const ForwardParams& params, const Shape& shape);

// `wanted` parts, or fewer where some would have no keys.
int limit_splits(int wanted, const ForwardParams& params, const Shape& shape);

// The same; for 0 as many as let a call with few rows fill the device.
int splits_of(int wanted, const ForwardParams& params, const Shape& shape, const Device& device);

// Whether so many parts of so few rows are merged that the warps of a CTA had better share a row.
bool shares_rows(int64_t rows, int num_splits, const Device& device);

// Query heads that run together, so that their keys and values stay in L2.
int choose_section(const ForwardParams& params, const Shape& shape, const Device& device);

// The section that has all heads behind it too: enough of them that CTAs end at about one time.
uint32_t last_section(const ForwardParams& params, const Shape& shape, const Device& device);

// Whether sequences should come in a line, those of many keys first, where tiles are shared; and
// how many blocks of rows that has at most.
bool wants_line(const ForwardParams& params, const Shape& shape, const Device& device);
int blocks_in_line(const ForwardParams& params, const Shape& shape);

// Whether CTAs run in pairs that load K and V together: of a causal call, in which few CTAs read
// the same keys at one time, and where no CTA of a pair would be left without rows.
bool is_paired(const ForwardParams& params, const Shape& shape, const Device& device);

// Whether CTAs take tile after tile from a counter.
bool shares_tiles(const ForwardParams& params, const Shape& shape, const Device& device);

// Key-value heads that run together: a wave of CTAs, of a size that leaves no short last section.
int choose_section(const BackwardParams& params, const Shape& shape, const Device& device);

// Key-value heads whose sums of dQ are zeroed beforehand: all; those of one section, where blocks
// of keys had better do the rest; or none, where the first to come had better store.
int choose_zeroed(const BackwardParams& params, const Shape& shape);

// Columns of CTAs that a deterministic backward call has, each with its own sums for dQ.
int choose_columns(const BackwardParams& params, const Shape& shape, const Device& device);

int64_t num_ctas(const ForwardParams& params, const Shape& shape, const Device& device);
// Shares of a decode call: CTAs, and rooms for what they have of sequences that are cut.
int64_t num_shares(const ForwardParams& params, const Shape& shape, const Device& device);

// Cuts the keys of a decode call into as many parts as fill the device, in clusters that merge
// them: if there is one sequence, whose heads are all as long. Of several with a cluster for each
// head, the device alone knows whether they suit: then it takes the cluster as the parts, else it
// goes without. Other calls stay as they are.
void choose_clusters(ForwardParams* params, const Shape& shape, const Device& device,
                     const Clusters& clusters);

int64_t num_ctas(const BackwardParams& params, const Shape& shape, const Device& device);
int64_t num_ctas_of_dq(const BackwardParams& params, const Shape& shape, const Device& device);

}  // namespace flash::host
