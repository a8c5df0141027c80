// out = x [R, K] @ weight [N, K]^T, in tiles of ROWS rows of x and COLUMNS columns of the product.
//
// A block computes tiles one after another, or a share of the sum over K of one tile. One warp asks
// the copy engine for the next STAGES steps of weight and x, across the borders of tiles; each group
// of four warps multiplies 64 columns with all rows. x is the narrow operand, so that ROWS is any
// multiple of 16 (of 32 with SILU).
//
//     full[s]:  the copies into stage s have arrived        (copy engine -> groups)
//     empty[s]: all groups have multiplied what was there   (groups -> copying warp)
//
// Defined before this text, by product.py: ROWS, COLUMNS, STAGES, MANY (tiles follow each other in a
// block), PARTS (float32 sums of shares), SILU, BIAS, REBALANCE, HALVES, NUMBER (bf16 or f16), and
// multiply(), one matrix instruction.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;  // a bf16 or f16
struct alignas(64) TensorMap {
  u64 words[16];
};
#if PARTS
typedef float Out;
#else
typedef u16 Out;
#endif

constexpr int GROUPS = COLUMNS / 64;
constexpr int STEP = 64;  // of K: 128 bytes, the widest line that is swizzled
constexpr int LINE = STEP * 2;
constexpr int STAGE = (COLUMNS + ROWS) * LINE;
constexpr int WIDE = SILU ? COLUMNS / 2 : COLUMNS;  // columns of the output
constexpr int PITCH = WIDE * 2 + 16;                // of the staged output
// Tiles that follow each other go in bands of this many rows of tiles, column by column: what the
// blocks read at a time then fits the cache. Else all are computed at a time, row by row.
constexpr int BAND = MANY ? 8 : 1;
// A step of a weight is read once, or once for every ROWS rows; one of x by every block.
constexpr u64 EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000;

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy_x(u32 to, const TensorMap* map, u32 barrier, int k, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(k), "r"(row), "l"(EVICT_LAST)
      : "memory");
}

__device__ __forceinline__ void copy_weight(u32 to, const TensorMap* map, u32 barrier, int k,
                                            int column) {
#if SILU
  // The weight as [N / 8][gate, up][8][K]: a thread's sums are a gate and the up beside it.
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(k), "r"(0), "r"(column / 16), "l"(EVICT_FIRST)
      : "memory");
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(k), "r"(column), "l"(EVICT_FIRST)
      : "memory");
#endif
}

// Descriptor of a matrix in shared memory: lines of 128 bytes along K, swizzled, eights of lines
// 1,024 bytes apart.
__device__ __forceinline__ u64 matrix_at(u32 address) {
  return (u64)(address >> 4 & 0x3FFF) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn." NUMBER "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float number_at(const u16* place) {
  float value;
  asm("cvt.f32." NUMBER " %0, %1;" : "=f"(value) : "h"(*place));
  return value;
}

// Four matrices of eight columns by eight rows, as a warp's sums hold them; in shared memory a line
// of eight columns for every row. `to` is the place of the lane's line.
__device__ __forceinline__ void store_turned(u32 to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

struct Tile {
  int column, row;  // the first ones, of the product
};

__device__ __forceinline__ Tile tile_at(int i, int n_rows, int width) {
  const int wide = (width + COLUMNS - 1) / COLUMNS, tall = (n_rows + ROWS - 1) / ROWS;
  const int band = i / (BAND * wide), within = i % (BAND * wide);
  const int high = min(BAND, tall - band * BAND);
  return {within / high * COLUMNS, (band * BAND + within % high) * ROWS};
}

__device__ __forceinline__ void meet_groups() {
  asm volatile("bar.sync 1, %0;" ::"n"(GROUPS * 128) : "memory");
}

extern "C" __global__ void __launch_bounds__(GROUPS * 128 + (REBALANCE ? 128 : 32), 1)
    product(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, Out* out,
            const u16* bias, int n_rows, int n, int steps) {
  extern __shared__ char shared[];
  const u32 base = ((u32)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
  const u32 full = base + STAGES * STAGE, empty = full + STAGES * 8;
  // Where the output is staged, the next tile's steps do not come.
  const u32 staged = MANY ? empty + STAGES * 8 : base;
  const int width = SILU ? 2 * n : n;
  const int n_tiles = (width + COLUMNS - 1) / COLUMNS * ((n_rows + ROWS - 1) / ROWS);
  const int part = blockIdx.y, first = part * steps;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const bool copies = threadIdx.x == GROUPS * 128;

  if (copies) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    // No kernel before this one writes weights: they may come while it still runs.
    const int column = tile_at(blockIdx.x, n_rows, width).column;
#pragma unroll 1
    for (int s = 0; s < STAGES && s < steps; s++) {
      barrier_expect(full + 8 * s, STAGE);
      copy_weight(base + s * STAGE, &w_map, full + 8 * s, (first + s) * STEP, column);
    }
  }
  __syncthreads();

  if (group == GROUPS) {
#if REBALANCE  // 128 registers a thread are too few for the sums; the copying warps need hardly any
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
    if (copies) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      asm volatile("griddepcontrol.launch_dependents;");
      int s = 0, asked = 0;
      u32 parity = 1;
#pragma unroll 1
      for (int t = blockIdx.x; t < n_tiles; t += gridDim.x) {
        const Tile tile = tile_at(t, n_rows, width);
#pragma unroll 1
        for (int i = 0; i < steps; i++, asked++) {
          const u32 stage = base + s * STAGE, barrier = full + 8 * s;
          if (asked >= STAGES) barrier_wait(empty + 8 * s, parity);
          if (asked >= STAGES || asked >= steps) {
            barrier_expect(barrier, STAGE);
            copy_weight(stage, &w_map, barrier, (first + i) * STEP, tile.column);
          }
          copy_x(stage + COLUMNS * LINE, &x_map, barrier, (first + i) * STEP, tile.row);
          if (++s == STAGES) {
            s = 0;
            parity ^= 1;
          }
        }
      }
    }
    return;
  }

#if REBALANCE
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
#endif
  int s = 0;
  u32 parity = 0;
#pragma unroll 1
  for (int t = blockIdx.x; t < n_tiles; t += gridDim.x) {
    const Tile tile = tile_at(t, n_rows, width);
    // sums[4 j + 2 h + e]: column 16 warp + 8 h + lane / 4 of the group's 64, row 8 j + 2 (lane % 4) + e.
    float sums[ROWS / 2];
    float(&halves)[HALVES][ROWS / 2 / HALVES] = *(float(*)[HALVES][ROWS / 2 / HALVES]) & sums;
    int before = 0;
    for (int i = 0; i < steps; i++) {
      const u32 stage = base + s * STAGE;
      barrier_wait(full + 8 * s, parity);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      const u64 a = matrix_at(stage + group * 64 * LINE), b = matrix_at(stage + COLUMNS * LINE);
#pragma unroll
      for (int k = 0; k < STEP / 16; k++)
#pragma unroll
        for (int h = 0; h < HALVES; h++)
          multiply(halves[h], a + 2 * k, b + 2 * k + h * (ROWS / HALVES * LINE >> 4), i > 0 || k > 0);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      // The step before this one has been multiplied when no more than one is under way.
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (i > 0 && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * before);
      before = s;
      if (++s == STAGES) {
        s = 0;
        parity ^= 1;
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int j = 0; j < ROWS / 2; j++) asm volatile("" : "+f"(sums[j])::"memory");
    if (MANY && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * before);

#if PARTS
    const int column = tile.column + group * 64 + warp * 16 + lane / 4;
    float* to = out + (long long)part * n_rows * n + column;
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int row = tile.row + 8 * j + 2 * (lane % 4) + e;
        if (row < n_rows) {
          to[(long long)row * n] = sums[4 * j + e];
          to[(long long)row * n + 8] = sums[4 * j + 2 + e];
        }
      }
#else
    // Through shared memory, so that lines of the output are written whole.
    const int begin = SILU ? tile.column / 2 : tile.column;
    meet_groups();  // no group still uses what is overwritten
#if SILU
    const int eight = group * 4 + warp;
    float gate_bias = 0, up_bias = 0;
    if (BIAS && begin + eight * 8 < n) {
      const u16* place = bias + begin + eight * 8 + lane / 4;
      gate_bias = number_at(place);
      up_bias = number_at(place + n);
    }
#pragma unroll
    for (int j = 0; j < ROWS / 8; j += 4) {
      u32 acted[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {
        float value[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float gate = sums[4 * (j + q) + e] + gate_bias;
          value[e] = __fdividef(gate, 1.0f + __expf(-gate)) * (sums[4 * (j + q) + 2 + e] + up_bias);
        }
        acted[q] = pack(value[0], value[1]);
      }
      store_turned(staged + (8 * j + lane) * PITCH + eight * 16, acted[0], acted[1], acted[2],
                   acted[3]);
    }
#else
    float biases[2] = {0, 0};
    if (BIAS)
      for (int h = 0; h < 2; h++) {
        const int column = begin + group * 64 + warp * 16 + 8 * h + lane / 4;
        if (column < n) biases[h] = number_at(bias + column);
      }
#pragma unroll
    for (int j = 0; j < ROWS / 8; j += 2) {
      u32 packed[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const int at = 4 * (j + q / 2) + 2 * (q % 2);
        packed[q] = pack(sums[at] + biases[q % 2], sums[at + 1] + biases[q % 2]);
      }
      const int row = 8 * (j + lane / 16) + lane % 8, eight = group * 8 + warp * 2 + lane / 8 % 2;
      store_turned(staged + row * PITCH + eight * 16, packed[0], packed[1], packed[2], packed[3]);
    }
#endif
    meet_groups();
    for (int i = threadIdx.x; i < ROWS * WIDE / 8; i += GROUPS * 128) {
      const int row = i / (WIDE / 8), at = i % (WIDE / 8) * 8;
      if (tile.row + row >= n_rows) break;
      uint4 line;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w)
                   : "r"(staged + row * PITCH + at * 2));
      if (begin + at < n) *(uint4*)(out + (long long)(tile.row + row) * n + begin + at) = line;
    }
#endif
  }
}
