// Finds sequences of a batch that begin with the same pages.
#pragma once

#include <vector>

#include "attention/paged_attention_cpu.h"

namespace memkernels::attention {

// Splits that several sequences have in common. Each row of a sequence gets the same bits there as
// it would alone: only the reading of the keys is shared.
struct SharedPrefixes {
  std::vector<int64_t> order;       // sequences, those with common pages side by side
  std::vector<SharedSplit> splits;  // members are ranges of `order`
};

// Also sets shared_splits of every sequence's tasks.
SharedPrefixes find_shared_prefixes(const Problem& p, std::vector<SequenceTasks>& tasks);

}  // namespace memkernels::attention
