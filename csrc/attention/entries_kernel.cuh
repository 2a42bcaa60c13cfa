// Which entries of page tables, or of lists, name a unit of keys.
#pragma once

#include "attention/key_stream.cuh"
#include "attention/paged_attention_backward_cuda.h"

namespace memkernels::attention::cuda {

// The sort key of every entry of the page table, or of the lists; entries that name nothing that
// exists come last.
static __global__ void __launch_bounds__(256)
    find_entries(const BackwardParams params, uint32_t* keys, int* entries) {
  const AttentionParams& p = params.a;
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= params.num_entries) return;
  int64_t b, list = 0, token;  // of the sequence
  if (p.listed) {
    const int64_t query = i / p.list_length / params.lists;
    list = i / p.list_length % params.lists;
    const int64_t index =
        integer_at(p.indices, query * p.list_query_stride + list * p.list_head_stride +
                                  i % p.list_length * p.indices.stride);
    b = query;
    if (p.cu_seqlens_q.data) {
      b = last_at_most(p.num_sequences, query, [&](int64_t j) { return first_query(p, j); });
    }
    token = index < 0 || index > kNoLimit ? -1 : index * p.unit;
  } else {
    const int64_t columns = params.num_entries / p.num_sequences;
    b = i / columns;
    token = i % columns * p.page_size;
  }
  int64_t key = params.lists * params.num_units;
  if (token >= 0 && token < extent_of(p, b).length) {
    int64_t page = b;
    if (p.page_table.data) {
      page = integer_at(p.page_table,
                        b * p.table_row_stride + token / p.page_size * p.page_table.stride);
    }
    if (page >= 0 && page < p.num_pages) {
      key = list * params.num_units + (page * p.page_size + token % p.page_size) / params.unit;
    }
  }
  keys[i] = static_cast<uint32_t>(key);
  entries[i] = static_cast<int>(i);
}

// Where the entries of each unit begin, among n sorted ones.
static __global__ void __launch_bounds__(256)
    find_runs(const uint32_t* keys, int n, int* run_begin, int64_t num_runs) {
  const int64_t run = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (run > num_runs) return;
  int begin = 0, past = n;
  while (begin < past) {
    const int middle = begin + (past - begin) / 2;
    if (keys[middle] < run) {
      begin = middle + 1;
    } else {
      past = middle;
    }
  }
  run_begin[run] = begin;
}

}  // namespace memkernels::attention::cuda
