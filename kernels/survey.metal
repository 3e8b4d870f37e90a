// One look at rows before they are encoded, or at queries: squares per channel, and which rows hold NaN or infinities.
//
// Inputs
//   rows     (B, H, capacity, D) T, a whole buffer; looked at are `count` rows from row `start` on
//   sizes    at least 8 int32: start, capacity, count
// Outputs, n = count / BLOCK blocks, rounded up
//   squares  (B, H, n, D) float32: with CENTER the sum over a block's rows of (x - mean)^2 for each channel, without it
//            of x^2, NaN and infinities left out; 8 zeros if not SQUARES
//   bad      (B, H, n, WORDS) uint32, WORDS = BLOCK / 32 rounded up: bit r % 32 of word r / 32 is set if row r of the
//            block holds a number that is not finite
// Template: T float16_t, bfloat16_t or float. D, a multiple of 8 up to 256. BLOCK. CENTER. SQUARES. THREADS, at least
//   D / 8 and a multiple of 32.
// Grid: (n, H, B) threadgroups of THREADS, one for each block. Buffers start at multiples of 16 bytes.
//
// A thread adds up 8 channels of every TEAMS-th row, in one pass: deviations from the block's first row, whose mean is
// taken off at the end, so that a large mean cancels before it is squared.

METAL_FUNC bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }

// ==== body ====
constexpr uint CHUNKS = D / 8;
constexpr uint TEAMS = THREADS / CHUNKS;
constexpr uint WORDS = (BLOCK + 31) / 32;

threadgroup float sums[SQUARES ? TEAMS * D : 1];
threadgroup float square_sums[SQUARES ? TEAMS * D : 1];
threadgroup float counts[SQUARES && CENTER ? TEAMS * D : 1];
threadgroup uchar flags[BLOCK * CHUNKS];
threadgroup uint of_row[BLOCK];

uint tid = thread_index_in_threadgroup;
uint block = threadgroup_position_in_grid.x, blocks = threadgroups_per_grid.x;
uint head = threadgroup_position_in_grid.z * threadgroups_per_grid.y + threadgroup_position_in_grid.y;
uint first = block * BLOCK;
uint here = min(uint(sizes[2]) - first, uint(BLOCK));
const device T* from = rows + (ulong(head) * ulong(sizes[1]) + ulong(uint(sizes[0]) + first)) * D;
uint team = tid / CHUNKS, channel = tid % CHUNKS * 8;

if (team < TEAMS) {
  float reference[8], sum[8], square[8], count[8];
  if (SQUARES && CENTER) { load_run<T, 8>(from + channel, reference); }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    reference[i] = SQUARES && CENTER && is_finite(reference[i]) ? reference[i] : 0.0f;
    sum[i] = square[i] = count[i] = 0.0f;
  }
  for (uint row = team; row < uint(BLOCK); row += TEAMS) {
    bool bad_run = false;
    if (row < here) {
      float x[8];
      load_run<T, 8>(from + ulong(row) * D + channel, x);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        bool fine = is_finite(x[i]);
        bad_run = bad_run || !fine;
        if (SQUARES) {
          float d = fine ? x[i] - reference[i] : 0.0f;
          sum[i] += d;
          square[i] = fma(d, d, square[i]);
          count[i] += fine ? 1.0f : 0.0f;
        }
      }
    }
    flags[row * CHUNKS + tid % CHUNKS] = bad_run ? 1 : 0;
  }
  if (SQUARES) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      uint at = SQUARES ? team * D + channel + uint(i) : 0;
      sums[at] = sum[i];
      square_sums[at] = square[i];
      if (CENTER) { counts[SQUARES && CENTER ? at : 0] = count[i]; }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (SQUARES) {
  for (uint d = tid; d < uint(D); d += THREADS) {
    float sum = 0.0f, square = 0.0f, count = 0.0f;
    for (uint i = 0; i < TEAMS; i++) {
      uint at = SQUARES ? i * D + d : 0;
      sum += sums[at];
      square += square_sums[at];
      if (CENTER) { count += counts[SQUARES && CENTER ? at : 0]; }
    }
    if (CENTER) { square = max(square - sum * (sum / max(count, 1.0f)), 0.0f); }
    squares[(ulong(head) * blocks + block) * D + d] = square;
  }
}
if (!SQUARES && head == 0 && block == 0 && tid < 8) { squares[tid] = 0.0f; }
// Runs of a row are neighbours: a thread looks through a row, then one through a word's rows.
for (uint row = tid; row < uint(BLOCK); row += THREADS) {
  uint any = 0;
  for (uint c = 0; c < CHUNKS; c++) { any |= uint(flags[row * CHUNKS + c]); }
  of_row[row] = any;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint word = tid; word < WORDS; word += THREADS) {
  uint bits = 0;
  for (uint r = 0; r < 32 && word * 32 + r < uint(BLOCK); r++) { bits |= of_row[word * 32 + r] << r; }
  bad[(ulong(head) * blocks + block) * WORDS + word] = bits;
}
