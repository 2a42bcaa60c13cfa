// Lists of rows of a table: what every lookup comes down to. Plain data, for the kernels.
#pragma once

#include <stdint.h>

namespace memkernels::lookup {

// One list after the other.
struct Lists {
  int64_t count = 0;
  const int64_t* starts = nullptr;  // [count + 1]
  const int64_t* rows = nullptr;    // [starts[count]]; -1 is skipped
  const void* factors = nullptr;    // [starts[count]] accumulators
};

// A part of the work on lists: some of them, and some of the columns.
struct Cut {
  int64_t begin, end;
  int64_t column, columns;
};

}  // namespace memkernels::lookup
