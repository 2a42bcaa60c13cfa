// Copies of small device tensors for the host to read.
#pragma once

#include <memory>
#include <vector>

#include "core/context.h"

namespace memkernels {

class HostCopies {
 public:
  HostCopies(const char* op, const Context& ctx) : op_(op), ctx_(ctx) {}

  // Points `t`, if it is given, to a copy that lives as long as this; waits for the stream.
  void replace(TensorView& t);

 private:
  const char* op_;
  const Context& ctx_;
  std::vector<std::unique_ptr<char[]>> copies_;
};

}  // namespace memkernels
