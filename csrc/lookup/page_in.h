// Tables in files larger than memory: the system is asked for the pages that a call will read,
// instead of being made to fetch one after the other as they are missed.
#pragma once

#include "core/tensor.h"
#include "lookup/lists.h"

namespace memkernels::lookup {

// Whether some of the rows lie on pages that are not in memory. A guess from a few of them.
bool missing_pages(const TensorView& table, const Lists& lists);

// Asks for the pages of the rows, in the order in which they lie and each once.
void page_in(const TensorView& table, const Lists& lists);

}  // namespace memkernels::lookup
