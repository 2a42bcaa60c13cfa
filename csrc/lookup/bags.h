// Which rows of a table each bag reads, checked and laid out for the kernels; and the same seen
// from the rows: which bags each of them went into.
#pragma once

#include <vector>

#include "core/context.h"
#include "core/memory.h"
#include "core/tensor.h"
#include "lookup/embedding_bag.h"

namespace memkernels::lookup {

struct OwnedLists : Lists {
  Workspace memory;
};

// Refuses what does not fit together; tensors only, not what they hold.
void check_bags(const char* op, const char* input, const char* factors, const Bags& bags,
                Device device, Dtype main);
int64_t num_bags(const Bags& bags);

// Reads the bags, and refuses an index outside [-1, num_rows) by its place.
OwnedLists make_lists(const char* op, const char* input, const Bags& bags, int64_t num_rows,
                      Dtype accumulator);

// One list for each row that the bags read, rising, of the bags that read it, in their order.
struct Readers {
  OwnedLists lists;
  std::vector<int64_t> rows;  // [lists.count]
};
Readers invert(const char* op, const Lists& lists, int64_t num_rows, Dtype accumulator);

// Cuts of about the same size, several for each worker. A long list is cut along its columns, which
// changes no sum; `whole_rows`: never.
std::vector<Cut> cut_lists(const Lists& lists, int64_t dim, int workers, bool whole_rows = false);

}  // namespace memkernels::lookup
