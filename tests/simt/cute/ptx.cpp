#include "ptx.h"

#include <cstdlib>
#include <cstring>
#include <map>

namespace simt {

namespace {

constexpr uint64_t kBarrierMark = 0x6d62617272696572;  // what its 8 bytes of shared memory hold
constexpr long kLongestWait = 200000;                  // polls

char* shared_at(uint64_t offset) {
  if (offset >= shared_bytes()) {
    fail("shared address %llu behind the %zu bytes of shared memory",
         static_cast<unsigned long long>(offset), shared_bytes());
  }
  return shared_memory() + offset;
}

// ---- mbarriers

struct Mbarrier {
  int count, pending;
  int64_t bytes;  // still expected
  uint32_t phase;

  void update() {
    if (pending != 0 || bytes != 0) return;
    phase ^= 1;
    pending = count;
  }
};
std::map<uint32_t, Mbarrier> mbarriers;

Mbarrier& mbarrier(uint32_t offset, Site site) {
  const auto found = mbarriers.find(offset);
  uint64_t mark;
  std::memcpy(&mark, shared_at(offset), 8);
  if (found == mbarriers.end() || mark != kBarrierMark + offset) {
    fail("mbarrier at %u used before its init, or overwritten, %s:%d", offset, site.file,
         site.line);
  }
  return found->second;
}

void init_mbarrier(const Instruction& i, const Operand* o, Site) {
  const auto offset = i.get<uint32_t>(o, 0);
  const uint64_t mark = kBarrierMark + offset;
  std::memcpy(shared_at(offset), &mark, 8);
  const int count = i.get<int>(o, 1);
  mbarriers[offset] = {count, count, 0, 0};
}

void wait_mbarrier(const Instruction& i, const Operand* o, Site site) {
  const auto offset = i.get<uint32_t>(o, 0), phase = i.get<uint32_t>(o, 1);
  for (long polls = 1; (mbarrier(offset, site).phase & 1) == phase; ++polls) {
    if (options.seed ? random_bits() % 64 == 0 : polls % 4 == 0) run_deferred();
    if (polls > kLongestWait) fail("mbarrier wait at %s:%d never ends", site.file, site.line);
    yield();
  }
}

void arrive(Mbarrier& b, int64_t bytes, Site site) {
  b.bytes += bytes;
  if (--b.pending < 0) {
    fail("mbarrier: more arrivals than it counts, %s:%d", site.file, site.line);
  }
  b.update();
}

// ---- TMA

std::map<uint64_t, TensorMap> tensor_maps;

// The 128, 64 or 32-byte permutation of 16-byte chunks.
uint32_t swizzled(uint32_t offset, uint32_t mode) {
  return mode == 0 ? offset : offset ^ ((offset >> 7 & ((1u << mode) - 1)) << 4);
}

void load_tile(const TensorMap& map, uint32_t to, uint32_t barrier, int64_t x, int64_t y) {
  const uint32_t row_bytes = map.box[0] * map.item_size;
  for (uint32_t r = 0; r < map.box[1]; ++r) {
    for (uint32_t c = 0; c < map.box[0]; ++c) {
      char item[8] = {};
      if (x + c >= 0 && y + r >= 0 && static_cast<uint64_t>(x + c) < map.size[0] &&
          static_cast<uint64_t>(y + r) < map.size[1]) {
        std::memcpy(item, map.base + (x + c) * map.item_size + (y + r) * map.row_stride,
                    map.item_size);
      }
      std::memcpy(shared_at(swizzled(to + r * row_bytes + c * map.item_size, map.swizzle)), item,
                  map.item_size);
    }
  }
  Mbarrier& b = mbarriers.at(barrier);
  b.bytes -= int64_t{row_bytes} * map.box[1];
  b.update();
}

void start_tile_load(const Instruction& i, const Operand* o, Site site) {
  const auto to = i.get<uint32_t>(o, 0), barrier = i.get<uint32_t>(o, 4);
  const int x = i.get<int>(o, 2), y = i.get<int>(o, 3);
  uint64_t id;
  std::memcpy(&id, reinterpret_cast<const void*>(i.get<uint64_t>(o, 1)), 8);
  mbarrier(barrier, site);
  const auto found = tensor_maps.find(id);
  if (found == tensor_maps.end()) fail("an unknown tensor map at %s:%d", site.file, site.line);
  const TensorMap map = found->second;
  if (options.async == Async::eager) {
    load_tile(map, to, barrier, x, y);
  } else {
    defer([=] { load_tile(map, to, barrier, x, y); });
  }
}

// ---- wgmma: m64nNk16, both operands K-major in shared memory, bfloat16
//
// Each of the four warps owns 16 rows, and is modelled by itself: neither wgmma nor its waits bring
// the warps together. Operands are read, and sums written, when the warp waits for the group.

struct WarpgroupProduct {
  uint64_t a, b;
  float* sums[32][128];
  int columns, group, warp;
  bool accumulate;
};

struct WarpQueue {
  std::vector<WarpgroupProduct> products;
  int group = 0;
} queues[32];

float operand_at(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = static_cast<int>(descriptor >> 62);  // 0: none, 1: 128 bytes, 2: 64, 3: 32
  uint32_t offset = start + (row >> 3) * stride;
  if (mode == 0) {
    offset += (row & 7) * 16 + (k >> 3) * leading + (k & 7) * 2;
  } else {
    offset = swizzled(offset + (row & 7) * (256 >> mode) + k * 2, 4 - mode);
  }
  uint16_t bits;
  std::memcpy(&bits, shared_at(offset), 2);
  return WidenBf16()(bits);
}

void execute(const WarpgroupProduct& p) {
  static float left[16][16], right[16][256], sums[16][256];
  std::memset(sums, 0, sizeof sums);
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16; ++row) left[row][k] = operand_at(p.a, p.warp % 4 * 16 + row, k);
    for (int column = 0; column < p.columns; ++column)
      right[k][column] = operand_at(p.b, column, k);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < p.columns; ++column) {
        sums[row][column] += left[row][k] * right[k][column];
      }
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < p.columns / 2; ++i) {
      const float sum = sums[l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2];
      *p.sums[l][i] = p.accumulate ? *p.sums[l][i] + sum : sum;
    }
  }
}

void start_product(const Instruction& i, const Operand* o, Site site) {
  struct Lane {
    uint64_t a, b;
    bool accumulate;
    int columns;
    float* sums[128];
  } mine{};
  mine.columns = std::atoi(std::strstr(i.text(), "m64n") + 4);
  const int registers = mine.columns / 2;
  for (int r = 0; r < registers; ++r) mine.sums[r] = static_cast<float*>(o[r].place);
  mine.a = o[registers].value;
  mine.b = o[registers + 1].value;
  mine.accumulate = o[registers + 2].value != 0;
  meet(
      "wgmma", ~0u, &mine,
      [](void* const* lanes, uint32_t) {
        const auto& first = *static_cast<Lane*>(lanes[0]);
        WarpQueue& queue = queues[warp()];
        WarpgroupProduct p{first.a, first.b,         {}, first.columns, queue.group,
                           warp(),  first.accumulate};
        for (int l = 0; l < 32; ++l) {
          const auto& lane = *static_cast<Lane*>(lanes[l]);
          if (lane.a != p.a || lane.b != p.b) fail("wgmma: descriptors differ within a warp");
          std::memcpy(p.sums[l], lane.sums, sizeof lane.sums);
        }
        if (options.async == Async::eager) {
          execute(p);
        } else {
          queue.products.push_back(p);
        }
      },
      true, site);
}

void commit_products(const Instruction&, const Operand*, Site site) {
  meet(
      "wgmma.commit_group", ~0u, nullptr, [](void* const*, uint32_t) { ++queues[warp()].group; },
      true, site);
}

void wait_products(const Instruction& i, const Operand* o, Site site) {
  int in_flight = i.get<int>(o, 0);
  meet(
      "wgmma.wait_group", ~0u, &in_flight,
      [](void* const* lanes, uint32_t) {
        WarpQueue& queue = queues[warp()];
        const int finished = queue.group - *static_cast<int*>(lanes[0]);
        size_t n = 0;
        while (n < queue.products.size() && queue.products[n].group < finished) {
          execute(queue.products[n++]);
        }
        queue.products.erase(queue.products.begin(), queue.products.begin() + n);
      },
      true, site);
}

// ---- sm_80

template <int kMatrices, bool kTransposed>
void load(const Instruction& i, const Operand* o, Site site) {
  uint32_t r[kMatrices];
  load_matrices<kMatrices, kTransposed>(r, shared_at(i.get<uint32_t>(o, kMatrices)), site);
  for (int m = 0; m < kMatrices; ++m) i.set(o, m, r[m]);
}

template <class Widen>
void multiply_16816(const Instruction& i, const Operand* o, Site site) {
  uint32_t a[4], b[2];
  float c[4];
  for (int k = 0; k < 4; ++k) a[k] = i.get<uint32_t>(o, 4 + k);
  for (int k = 0; k < 2; ++k) b[k] = i.get<uint32_t>(o, 8 + k);
  for (int k = 0; k < 4; ++k) c[k] = i.get<float>(o, 10 + k);
  multiply<16, 2>("mma.m16n8k16", c, a, b, Widen(), site);
  for (int k = 0; k < 4; ++k) i.set(o, k, c[k]);
}

// cp.async [to], [from], bytes {, valid}: the sizes are operands or literals.
void start_copy(const Instruction& i, const Operand* o, Site site) {
  const char* p = std::strchr(std::strchr(i.text(), ']') + 1, ']') + 1;
  int sizes[2] = {16, -1};
  for (int k = 0; k < 2 && *p == ','; ++k) {
    p += 1 + std::strspn(p + 1, " ");
    const bool operand = *p == '%';
    const int number = std::atoi(p + operand);
    sizes[k] = operand ? static_cast<int>(o[number].value) : number;
    p += operand + std::strspn(p + operand, "0123456789");
  }
  copy_async(shared_at(i.get<uint32_t>(o, 0)), reinterpret_cast<void*>(i.get<uint64_t>(o, 1)),
             sizes[0], sizes[1] < 0 ? sizes[0] : sizes[1], site);
}

void nothing(const Instruction&, const Operand*, Site) {}

void refuse(const Instruction& i, const Operand*, Site site) {
  fail("PTX that the runner lacks, at %s:%d: %.120s", site.file, site.line, i.text());
}

// The first whose parts all occur in the text.
const struct {
  const char* parts[3];
  Handler handler;
} kInstructions[] = {
    {{"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}, multiply_16816<WidenBf16>},
    {{"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"}, multiply_16816<WidenF16>},
    {{"ldmatrix.sync.aligned", ".x4", ".trans"}, load<4, true>},
    {{"ldmatrix.sync.aligned", ".x4"}, load<4, false>},
    {{"ldmatrix.sync.aligned", ".x2", ".trans"}, load<2, true>},
    {{"ldmatrix.sync.aligned", ".x2"}, load<2, false>},
    {{"cp.async.bulk.tensor.2d.shared::c", "mbarrier::complete_tx"}, start_tile_load},
    {{"prefetch.tensormap"}, nothing},
    {{"cp.async.bulk"}, refuse},
    {{"cp.async.commit_group"}, [](const Instruction&, const Operand*, Site) { commit_copies(); }},
    {{"cp.async.wait_all"},
     [](const Instruction&, const Operand*, Site) {
       commit_copies();
       wait_copies(0);
     }},
    {{"cp.async.wait_group"},
     [](const Instruction& i, const Operand* o, Site) { wait_copies(i.get<int>(o, 0)); }},
    {{"cp.async.c"}, start_copy},
    {{"mbarrier.init"}, init_mbarrier},
    {{"mbarrier.try_wait.parity", "bra"}, wait_mbarrier},
    {{"mbarrier.arrive.expect_tx.shared::cta"},
     [](const Instruction& i, const Operand* o, Site site) {
       arrive(mbarrier(i.get<uint32_t>(o, 0), site), i.get<uint32_t>(o, 1), site);
     }},
    {{"mbarrier.arrive.shared::cta"},
     [](const Instruction& i, const Operand* o, Site site) {
       arrive(mbarrier(i.get<uint32_t>(o, 0), site), 0, site);
     }},
    {{"elect.sync"},
     [](const Instruction&, const Operand* o, Site site) {
       meet("elect.sync", ~0u, nullptr, [](void* const*, uint32_t) {}, false, site);
       const uint32_t leader = 0, elected = lane() == 0;
       std::memcpy(o[0].place, &leader, 4);
       if (elected) std::memcpy(o[1].place, &elected, 4);
     }},
    {{"wgmma.mma_async.sync.aligned.m64n", "k16.f32.bf16.bf16"}, start_product},
    {{"wgmma.commit_group"}, commit_products},
    {{"wgmma.wait_group"}, wait_products},
    {{"bar.sync"},
     [](const Instruction& i, const Operand* o, Site site) {
       barrier(i.get<int>(o, 0), i.get<int>(o, 1), "bar.sync", site);
     }},
    {{"bar.arrive"},
     [](const Instruction& i, const Operand* o, Site site) {
       barrier(i.get<int>(o, 0), i.get<int>(o, 1), "bar.arrive", site, true);
     }},
    // Threads of the runner see each other's writes at once, so fences have nothing to do.
    {{"fence"}, nothing},
};

const bool registered = [] {
  on_block([] {
    mbarriers.clear();
    for (WarpQueue& queue : queues) queue = WarpQueue();
  });
  return true;
}();

}  // namespace

Instruction::Instruction(const char* text) : text_(text), handler_(*text ? refuse : nothing) {
  (void)registered;
  for (const char* p = text; *p; ++p) {
    if (*p == '%' && p[1] >= '0' && p[1] <= '9') order_.push_back(std::atoi(p + 1));
  }
  for (const auto& known : kInstructions) {
    bool matches = true;
    for (const char* part : known.parts) matches &= part == nullptr || std::strstr(text, part);
    if (!matches) continue;
    handler_ = known.handler;
    break;
  }
}

uint32_t offset_of(const void* p) {
  if (!in_shared(p, 1)) fail("a shared address of what is not in shared memory");
  return static_cast<uint32_t>(static_cast<const char*>(p) - shared_memory());
}

uint64_t add_tensor_map(const TensorMap& map) {
  const uint64_t id = tensor_maps.size() + 1;
  tensor_maps[id] = map;
  return id;
}

}  // namespace simt

// What CuTe's host code calls to make a tensor map.
extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* size,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank != 2) return CUDA_ERROR_NOT_SUPPORTED;
  simt::TensorMap m{static_cast<const char*>(base),
                    type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4u : 2u,
                    static_cast<uint32_t>(swizzle),
                    {size[0], size[1]},
                    strides[0],
                    {box[0], box[1]}};
  const uint64_t id = simt::add_tensor_map(m);
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &id, sizeof id);
  return CUDA_SUCCESS;
}
