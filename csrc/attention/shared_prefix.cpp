#include "attention/shared_prefix.h"

#include <algorithm>

namespace memkernels::attention {

namespace {

// Leading splits that every query and head of the sequence sees whole.
int64_t whole_splits(const Problem& p, const SequenceTasks& t, const Sequence& s) {
  if (t.num_splits == 1) return 0;
  const int64_t seen = p.causal ? std::min(s.kv_len, s.kv_len - s.num_q + 1) : s.kv_len;
  return std::max<int64_t>(0, seen) / t.split_len;
}

class Prefixes {
 public:
  Prefixes(const Problem& p, const std::vector<SequenceTasks>& tasks) : p_(p), tasks_(tasks) {}

  int64_t splits(int64_t b) const { return whole_splits(p_, tasks_[b], p_.sequences[b]); }

  // An order that brings sequences with common pages together.
  bool before(int64_t a, int64_t b) const {
    const int64_t shape_a[] = {tasks_[a].split_len, p_.sequences[a].num_q};
    const int64_t shape_b[] = {tasks_[b].split_len, p_.sequences[b].num_q};
    if (!std::equal(shape_a, shape_a + 2, shape_b)) {
      return std::lexicographical_compare(shape_a, shape_a + 2, shape_b, shape_b + 2);
    }
    const int64_t common = std::min(pages(a), pages(b)), equal = equal_pages(a, b, common);
    return equal == common ? pages(a) < pages(b) : page(a, equal) < page(b, equal);
  }

  // Leading splits that a and b have in common.
  int64_t common_splits(int64_t a, int64_t b) const {
    if (tasks_[a].split_len != tasks_[b].split_len) return 0;
    if (p_.sequences[a].num_q != p_.sequences[b].num_q) return 0;
    const int64_t most = std::min(splits(a), splits(b));
    const int64_t equal = equal_pages(a, b, std::min(pages(a), pages(b)));
    return std::min(most, equal * p_.page_size / tasks_[a].split_len);
  }

 private:
  int64_t pages(int64_t b) const {
    return (splits(b) * tasks_[b].split_len + p_.page_size - 1) / p_.page_size;
  }
  int64_t page(int64_t b, int64_t column) const {
    return integer_at(p_.page_table, p_.wide_table,
                      b * p_.table_row_stride + column * p_.table_stride);
  }
  int64_t equal_pages(int64_t a, int64_t b, int64_t most) const {
    int64_t n = 0;
    while (n < most && page(a, n) == page(b, n)) ++n;
    return n;
  }

  const Problem& p_;
  const std::vector<SequenceTasks>& tasks_;
};

}  // namespace

SharedPrefixes find_shared_prefixes(const Problem& p, std::vector<SequenceTasks>& tasks) {
  SharedPrefixes found;
  const bool windows =
      std::any_of(p.window, p.window + p.num_kv_heads, [](int64_t w) { return w != kNoWindow; });
  if (p.page_table == nullptr || p.indices.data != nullptr || windows) return found;
  const Prefixes prefixes(p, tasks);
  std::vector<int64_t>& order = found.order;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    if (prefixes.splits(b) > 0) order.push_back(b);
  }
  const int64_t n = order.size();
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return prefixes.before(a, b); });
  std::vector<int64_t> common(n + 1);  // splits order[i - 1] and order[i] have in common
  int64_t most = 0;
  for (int64_t i = 1; i < n; ++i) {
    common[i] = prefixes.common_splits(order[i - 1], order[i]);
    most = std::max(most, common[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    tasks[order[i]].shared_splits = std::max(common[i], common[i + 1]);
  }
  for (int64_t split = 0; split < most; ++split) {
    for (int64_t begin = 0, end; begin < n; begin = end) {
      for (end = begin + 1; end < n && common[end] > split; ++end) {
      }
      if (end - begin > 1) found.splits.push_back({split, begin, end});
    }
  }
  return found;
}

}  // namespace memkernels::attention
