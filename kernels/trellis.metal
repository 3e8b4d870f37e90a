// Rows to the codes of the nearest path through a trellis: the Viterbi algorithm of ops/viterbi.py, a row for 16 lanes.
//
// Inputs
//   rows      (n, D) float32
//   sizes     at least 8 int32: n, D, start, dim, chunks; elements start to start + dim of each row are encoded,
//             chunks = ceil(dim / 16)
// Outputs
//   codes     (n, chunks) uint32, 2 bits an element, as mlx_turboquant/packing.py packs them
//   products  (n,) float32, sum over elements of row * value
//   back      (rows of all threadgroups, chunks, 16 lanes, 4) uint32, scratch
// Template: NSG, simdgroups of a threadgroup.
// Grid: x: ceil(n / (2 * NSG)). 32 * NSG threads. Inputs and products of fewer than 8 numbers are padded.
//
// A state t is the codes of the last three elements, the oldest in the lowest bits; the window 4 t + j adds the code
// j before them and names the element's value. Before the window was made the state was its lowest 6 bits: t = 16 h + m
// can follow the states 4 m + j, whatever h is. So lane m of a row has the four states 16 h + m and needs the costs of
// four others, the same for all its states. Its slot k is the state with h = (m - k) % 4. State 4 m + j then lies in
// slot (j - m / 4) % 4 of its lane, so that in round r every lane publishes slot r and reads j = (r + m / 4) % 4.

METAL_FUNC uint window_of(uint word, uint before, uint i) {  // element i of a word, whose earlier codes are `before`
  return (i < 3 ? (word << 6 | before) >> (2 * i) : word >> ((2 * i - 6) & 31u)) & 255u;
}

// ==== body ====
threadgroup float values[256];

uint tid = thread_index_in_threadgroup;
uint lane = thread_index_in_simdgroup;
uint n = uint(sizes[0]), D = uint(sizes[1]), start = uint(sizes[2]), dim = uint(sizes[3]), chunks = uint(sizes[4]);
for (uint i = tid; i < 256; i += 32 * NSG) { values[i] = trellis_value(i); }
threadgroup_barrier(mem_flags::mem_threadgroup);

uint m = lane & 15u, other = lane & 16u;  // the simdgroup's other row has the other half of the lanes
uint slot_row = (threadgroup_position_in_grid.x * NSG + simdgroup_index_in_threadgroup) * 2 + other / 16;
uint row = min(slot_row, n - 1);  // rows beyond the last are worked on, into scratch of their own, and not written
const device float* x = rows + ulong(row) * D + start;
device uint4* mine = (device uint4*)back + ulong(slot_row) * chunks * 16 + m;

float value[4][4], cost[4];
ushort from[4];
#pragma unroll
for (int r = 0; r < 4; r++) {
  uint j = (r + m / 4) & 3u;
  from[r] = ushort(other + (4 * m & 15u) + j);
#pragma unroll
  for (int k = 0; k < 4; k++) { value[k][r] = values[4 * (16 * ((m - k) & 3u) + m) + j]; }
}
#pragma unroll
for (int k = 0; k < 4; k++) { cost[k] = m == 0 && k == 0 ? 0.0f : 1e30f; }  // a row starts in state 0

for (uint chunk = 0; chunk < chunks; chunk++) {
  float ahead = 16 * chunk + m < dim ? x[16 * chunk + m] : 0.0f;
  uint count = min(16u, dim - 16 * chunk);
  uint rounds[4] = {0, 0, 0, 0};
  for (uint i = 0; i < count; i++) {
    float here = simd_shuffle(ahead, ushort(other + i));
    float best[4];
    uint which[4] = {0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < 4; r++) {
      float before = simd_shuffle(cost[r], from[r]);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        float error = here - value[k][r];
        float total = fma(error, error, before);
        bool better = r == 0 || total < best[k];
        best[k] = better ? total : best[k];
        which[k] = better ? uint(r) : which[k];
      }
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      cost[k] = best[k];
      rounds[k] |= which[k] << (2 * i);
    }
  }
  mine[chunk * 16] = uint4(rounds[0], rounds[1], rounds[2], rounds[3]);
}

float least = cost[0];
uint t = 16 * (m & 3u) + m;
#pragma unroll
for (int k = 1; k < 4; k++) {
  t = cost[k] < least ? 16 * ((m - k) & 3u) + m : t;
  least = min(cost[k], least);
}
#pragma unroll
for (int step = 8; step > 0; step /= 2) {
  float their = simd_shuffle_xor(least, ushort(step));
  uint theirs = simd_shuffle_xor(t, ushort(step));
  t = their < least || (their == least && theirs < t) ? theirs : t;  // the same in all lanes of the row
  least = min(their, least);
}

float product = 0.0f;
for (uint chunk = chunks; chunk-- > 0;) {
  uint4 rounds = mine[chunk * 16];  // what this lane wrote itself
  uint count = min(16u, dim - 16 * chunk), word = 0;
  for (uint i = count; i-- > 0;) {
    uint h = t / 16, low = t & 15u, slot = (low - h) & 3u;
    uint any = slot < 2 ? (slot == 0 ? rounds.x : rounds.y) : (slot == 2 ? rounds.z : rounds.w);
    uint r = simd_shuffle(any, ushort(other + low)) >> (2 * i);
    word |= h << (2 * i);
    t = (4 * t + ((r + low / 4) & 3u)) & 63u;
  }
  float own = m < count ? x[16 * chunk + m] : 0.0f;
  product = fma(own, values[window_of(word, t, m)], product);
  if (m == 0 && slot_row < n) { codes[ulong(row) * chunks + chunk] = word; }
}
#pragma unroll
for (int step = 8; step > 0; step /= 2) { product += simd_shuffle_xor(product, ushort(step)); }
if (m == 0 && slot_row < n) { products[row] = product; }
