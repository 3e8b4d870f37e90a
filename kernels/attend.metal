// Attention of a few queries over one compressed layer: sinks, packed blocks and the raw tail, in one softmax.
//
// Inputs (T is the model's dtype; arrays are row contiguous; whole buffers, so that nothing is copied; see `sizes`)
//   q          (B, H, L, D) T              the newest L tokens, 1 to 8
//   k_codes    (B, Hkv, cap, Wk) uint32    packing.py's words; (B, Hkv, cap, D) T where KB is 0; with SIGNS, the words
//                                          of the codes and then those of the signs, a bit per element, 1 for +
//   k_scales   (B, Hkv, cap, KG) T         what a group's centroids are multiplied with; not read where KB is 0; with
//                                          SIGNS (B, Hkv, cap, 2): that, and what the signs are multiplied with
//   k_centers  (B, Hkv, cap / block, D) T  each block's mean key; not read unless CENTER
//   v_codes, v_scales                      likewise, VB and VG
//   sink_k, sink_v  (B, Hkv, S, D) T       the first tokens
//   tail_k, tail_v  (B, Hkv, tcap, D) T    the newest tokens
//   balance    (B, Hkv, D) float32         keys were multiplied with it; not read unless BALANCE
//   table      float32: the scale of the scores, 7 unused; the rotation's signs (D,) and Hartley matrix, see rotation.h
//   sizes      int32: cap, tcap, S, packed splits, raw splits (in a single pass: simdgroups), mask strides of B, H, L;
//              then for each sequence its valid rows of sinks, packed rows and tail, and how many of the last are beside
//              the tail (0 unless TURBOQUANT_BESIDE)
//   mask       (.., .., .., tokens) bool or float, strides in `sizes`; not read unless MASK
//   logits     (H,) float                  attention-sink logits; read by the single pass only, and if LOGITS
//   sketch     (B, H, L, D) float32        what meets the signs: balanced queries times a projection, without the scale
//                                          of the scores; not read unless SIGNS
//   few_k, few_v, new_k, new_v  with TURBOQUANT_BESIDE: (B, Hkv, 16, D) T, the rows that follow those of the tail, all
//                                          but the newest; (B, Hkv, 1, D) T, the newest. See tail_parts.py
// Output
//   out        two passes: (B * H * L, splits, D + 2) float32: a split's weighted sum of values, not yet divided, its
//              largest score in units of log 2, its sum of weights; single pass: (B, H, L, D) T
//   out_few_k, out_few_v  with TURBOQUANT_BESIDE: (B, Hkv, 16, D) T, the few rows and the newest behind them, then zeros
// Template constants
//   T, O (dtype of out), D, HKV, G (query heads per KV head), L, BLOCK (tokens per centre), KB and VB (bits; 0 is raw),
//   KG and VG (groups per row), SIGNS (keys have signs of their residuals, see quantizers/qjl.py: KB is 2 or 3, KG 1),
//   CENTER, BALANCE, MASK (0 none, 1 boolean, 2 added), CAUSAL (query l sees tokens up to length - L + l), LOGITS,
//   SINGLE, RC (query rows of a threadgroup, a power of two), KD and VD (elements of a key and of a value that one lane
//   reads), NSG (simdgroups)
// Grid
//   x: packed splits, then raw splits (1 if SINGLE); y: Hkv * ceil(H / Hkv * L / RC); z: B. 32 * NSG threads.
//
// A threadgroup serves RC query rows of one KV head, so that each code is unpacked once for all of them. A simdgroup
// walks through a range of tiles of 16 tokens, of the packed blocks or of the raw rows (sinks, then tail), never both:
// packed values are summed rotated, raw ones as they are. In a tile D / KD lanes share a key: each multiplies its KD
// elements with all RC rows, a reduce-scatter leaves each lane one row's score, and D / VD lanes share a value. With
// SIGNS a key is two rows of D elements: centroids * scale meets the turned query, +-t its sketch, in one sum.
// Scores and sums are float32. NaN and infinite raw elements count as 0. A row without any key to see gives 0.

constant constexpr int TILE = 16;
constant constexpr uint FEW = 16;  // of mlx_turboquant/tail_parts.py
constant constexpr float LOG2E = 1.44269504088896f;
constant constexpr float MASKED = -3e38f;  // exp2 of MASKED - NO_KEY is 0 ...
constant constexpr float NO_KEY = -1e30f;  // ... and a largest score that is no score yet

// The centroid that this lane holds; BITS is 2, 3 or 4 (else it is not used).
template <int BITS> METAL_FUNC float centroid_at(uint lane) {
  return BITS == 2 ? codebook_2[lane % 4] : BITS == 3 ? codebook_3[lane % 8] : codebook_4[lane % 16];
}

// The softmax of one simdgroup so far: for row hx in each lane, and weighted values for all rows.
template <int RC, int VD> struct Partial {
  float top;        // largest score of row hx
  float total;      // sum of weights of row hx, this lane's keys only
  float o[RC][VD];  // row g, the lane's VD elements, its keys only
};

// Add up a[j], this lane's share of row j ^ hx, over the LANES lanes of a key; returns the sum for row hx.
// hx = (lane % LANES) / (LANES / RC), so partners keep what the other gives away, without a select.
template <int RC, int LANES> METAL_FUNC float reduce_scatter(thread float* a) {
#pragma unroll
  for (int step = LANES / 2; step >= 1; step /= 2) {
    constexpr int KEEP = RC;
    int rows = step * RC / LANES;  // rows that stay; 0 once there is one
    if (rows >= 1) {
#pragma unroll
      for (int j = 0; j < KEEP; j++) {
        if (j < rows) { a[j] += simd_shuffle_xor(a[(j + rows) % RC], ushort(step)); }
      }
    } else {
      a[0] += simd_shuffle_xor(a[0], ushort(step));
    }
  }
  return a[0];
}

// A lane's elements of one centre: numbers lane, lane + 32, ..
template <typename T, int D> METAL_FUNC void load_center(const device T* at, uint lane, thread float* out) {
#pragma unroll
  for (int e = 0; e < (D + 31) / 32; e++) {
    uint i = uint(e) * 32 + lane;
    out[e] = i < uint(D) ? float(at[i]) : 0.0f;
  }
}

template <typename T, int N> METAL_FUNC void load_scales(const device T* at, thread float* out) {
  if (sizeof(T) == 2 && N % 2 == 0) {
    const device uint* pairs = (const device uint*)at;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      uint pair = pairs[i];
      out[2 * i] = narrow_to_float<T>(ushort(pair & 0xffffu));
      out[2 * i + 1] = narrow_to_float<T>(ushort(pair >> 16));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) { out[i] = float(at[i]); }
  }
}

// What one tile needs besides its rows; the same for all tiles of a simdgroup.
struct Lanes {
  uint lane, ksub, kkey, vsub, vkey, hx;
};

// Scores s[QS] of row hx for the lane's QS keys -> weights times `value_scale` in `weights`; rescales what was there.
template <int RC, int VD, int KL, int QS>
METAL_FUNC void softmax_step(thread Partial<RC, VD>& part, thread float* s, thread const float* value_scale,
                             threadgroup float* weights, Lanes at) {
  float top = s[0];
#pragma unroll
  for (int i = 1; i < QS; i++) { top = max(top, s[i]); }
#pragma unroll
  for (int step = KL; step < 32; step *= 2) { top = max(top, simd_shuffle_xor(top, ushort(step))); }
  top = max(part.top, top);
  float shrink = fast::exp2(part.top - top);
  bool moved = top > part.top;
  part.top = top;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < QS; i++) {
    float p = fast::exp2(s[i] - top);
    sum += p;
    s[i] = p * value_scale[i];
  }
  part.total = part.total * shrink + sum;
  if (at.ksub % (KL / RC) == 0) {
#pragma unroll
    for (int i = 0; i < QS; i++) { weights[(at.kkey * QS + i) * RC + at.hx] = s[i]; }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (simd_any(moved)) {
#pragma unroll
    for (int g = 0; g < RC; g++) {
      float f = simd_shuffle(shrink, ushort(g * (KL / RC)));
#pragma unroll
      for (int j = 0; j < VD; j++) { part.o[g][j] *= f; }
    }
  }
}

// The RC weights of one key.
template <int RC> METAL_FUNC void load_weights(threadgroup const float* at, thread float* p) {
  if (RC % 4 == 0) {
#pragma unroll
    for (int i = 0; i < RC / 4; i++) {
      float4 four = ((threadgroup const float4*)at)[i];
      p[(4 * i) % RC] = four.x;
      p[(4 * i + 1) % RC] = four.y;
      p[(4 * i + 2) % RC] = four.z;
      p[(4 * i + 3) % RC] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < RC; i++) { p[i] = at[i]; }
  }
}

// A masked score is MASKED; an added mask of -1e30 or less masks too.
template <int MASK, typename M>
METAL_FUNC float masked(float score, const device M* mask, ulong row, uint token, int last) {
  if (MASK == 1 && !(float(mask[row + token]) > 0.0f)) { return MASKED; }
  if (MASK == 2) { score += max(float(mask[row + token]), MASKED) * LOG2E; }
  return int(token) > last || score <= NO_KEY ? MASKED : score;
}

// The raw rows of a side, in words: sinks, then the tail, then what lies beside it.
struct RawRows {
  const device uint* first;
  const device uint* tail;
#ifdef TURBOQUANT_BESIDE
  const device uint* few;
  const device uint* newest;
  uint held, all;  // rows of sinks and tail; those beside it too
#endif
  uint sinks;

  template <int WORDS> METAL_FUNC const device uint* at(uint n) const {
    if (n < sinks) { return first + ulong(n) * WORDS; }
#ifdef TURBOQUANT_BESIDE
    if (n >= held) { return n + 1 < all ? few + (n - held) * WORDS : newest; }
#endif
    return tail + ulong(n - sinks) * WORDS;
  }
};

// ==== body ====
  constexpr int DP = D <= 64 ? 64 : D <= 128 ? 128 : 256;  // lanes are laid out for the next power of two
  constexpr int E = (D + 31) / 32;
  constexpr int KL = DP / KD, KEYS = 32 / KL, QS = TILE / KEYS;
  constexpr int VL = DP / VD, VALUES = 32 / VL, VS = TILE / VALUES;
  constexpr int CODE_WORDS = words_of_row(KB, D, sizeof(T)), VWORDS = words_of_row(VB, D, sizeof(T));
  constexpr int KWORDS = CODE_WORDS + (SIGNS ? (D + 31) / 32 : 0), KNUMBERS = KG + SIGNS;
  constexpr int RAW_WORDS = words_of_row(0, D, sizeof(T));
  constexpr int KSPAN = D / KG, VSPAN = D / VG;  // elements of a group
  constexpr int QR = (RC + NSG - 1) / NSG;  // query rows that a simdgroup prepares
  constexpr int SHARED = NSG * RC * DP > 2 * RC * DP ? NSG * RC * DP : 2 * RC * DP;

  threadgroup float shared_rows[SHARED];  // first the queries, plain and turned; in the end each simdgroup's sums
  threadgroup float4 weight_rows[(NSG * TILE * RC + 3) / 4];
  threadgroup float tops[NSG * RC];
  threadgroup float totals[NSG * RC];
  threadgroup float wide_k[KB == 8 ? 256 : 1];
  threadgroup float wide_v[VB == 8 ? 256 : 1];
  threadgroup float* plain = shared_rows;
  threadgroup float* turned = shared_rows + RC * DP;

  uint tid = thread_index_in_threadgroup;
  uint sg = simdgroup_index_in_threadgroup;
  Lanes at;
  at.lane = thread_index_in_simdgroup;
  at.ksub = at.lane % KL;
  at.kkey = at.lane / KL;
  at.vsub = at.lane % VL;
  at.vkey = at.lane / VL;
  at.hx = at.ksub / (KL / RC);

  constexpr uint rows = G * L;  // query rows of a KV head
  constexpr uint chunks = (rows + RC - 1) / RC;
  uint b = threadgroup_position_in_grid.z;
  uint kvh = threadgroup_position_in_grid.y / chunks;
  uint row0 = threadgroup_position_in_grid.y % chunks * RC;
  uint split = threadgroup_position_in_grid.x;
  ulong head = ulong(b) * HKV + kvh;
  // What does not depend on `sizes` is asked for together with them, not a trip to memory later.
  const device float* signs = table + 8;
  const device float* hartley = signs + D;
  float scale = table[0];
  float asked[QR][E], turn[E], weight[E];
#pragma unroll
  for (int e = 0; e < E; e++) {
    uint i = uint(e) * 32 + at.lane;
#pragma unroll
    for (int n = 0; n < QR; n++) {
      uint r = row0 + sg + uint(n) * NSG;
      asked[n][e] = r < rows && i < uint(D) ? float(q[(head * rows + r) * D + i]) : 0.0f;
    }
    if (KB > 0) { turn[e] = i < uint(D) ? signs[i] : 0.0f; }
    if (KB > 0 && BALANCE) { weight[e] = i < uint(D) ? float(balance[head * D + i]) : 1.0f; }
  }
  uint sinks = uint(sizes[8 + 4 * b]), packed = uint(sizes[9 + 4 * b]), tail = uint(sizes[10 + 4 * b]);
  uint raw = sinks + tail, tokens = raw + packed;

  // This simdgroup's share: worker `worker` of `workers`, of the packed or of the raw tiles.
  uint raw_share = uint(sizes[4]);
  uint packed_workers = SINGLE ? NSG - raw_share : uint(sizes[3]) * NSG;
  uint worker = SINGLE ? sg : split * NSG + sg;
  bool on_raw = worker >= packed_workers;
  uint workers = on_raw ? raw_share * (SINGLE ? 1 : NSG) : packed_workers;
  if (on_raw) { worker -= packed_workers; }
  uint tiles = on_raw ? (raw + TILE - 1) / TILE : packed / TILE;
  uint tile = uint(ulong(tiles) * worker / workers), stop = uint(ulong(tiles) * (worker + 1) / workers);

  uint kfirst = at.ksub * KD < uint(D) ? at.ksub * KD : 0;  // lanes beyond D read the first elements, times 0
  uint vfirst = at.vsub * VD < uint(D) ? at.vsub * VD : 0;
  // The first keys and values are on their way while the queries are prepared, and the next tile's as soon as registers
  // are free: between two layers a model's weights push everything out of the caches.
  ulong base = head * ulong(sizes[0]);
  const device uint* krows = (const device uint*)k_codes + base * KWORDS;
  const device uint* next_k = krows + ulong(tile * TILE + at.kkey * QS) * KWORDS;  // the lane's first key
  ulong first_key = base + ulong(tile * TILE + at.kkey * QS);
  const device uint* next_v = (const device uint*)v_codes + (base + ulong(tile * TILE + at.vkey)) * VWORDS;
  const device T* kscales = k_scales + first_key * KNUMBERS + kfirst / KSPAN;
  const device T* vscales = v_scales + first_key * VG;
  const device T* centers = k_centers + base / BLOCK * D;
  Run<T, KB, KD> k[QS];
  Run<T, VB, VD> v[VS];
  float center[E];
  float kscale[QS], vscale[QS];
  if (VB == 0 || VG > 1) { for (int i = 0; i < QS; i++) { vscale[i] = 1.0f; } }
#ifdef TURBOQUANT_BESIDE
  uint beside = uint(sizes[11 + 4 * b]);
#endif
  RawRows raw_k, raw_v;
  raw_k.first = (const device uint*)sink_k + head * ulong(sizes[2]) * RAW_WORDS;
  raw_v.first = (const device uint*)sink_v + head * ulong(sizes[2]) * RAW_WORDS;
  raw_k.tail = (const device uint*)tail_k + head * ulong(sizes[1]) * RAW_WORDS;
  raw_v.tail = (const device uint*)tail_v + head * ulong(sizes[1]) * RAW_WORDS;
  raw_k.sinks = raw_v.sinks = sinks;
#ifdef TURBOQUANT_BESIDE
  raw_k.few = (const device uint*)few_k + head * (FEW * RAW_WORDS);
  raw_v.few = (const device uint*)few_v + head * (FEW * RAW_WORDS);
  raw_k.newest = (const device uint*)new_k + head * RAW_WORDS;
  raw_v.newest = (const device uint*)new_v + head * RAW_WORDS;
  raw_k.held = raw_v.held = raw - beside;
  raw_k.all = raw_v.all = raw;
#endif
  if (!on_raw && tile < stop) {
#pragma unroll
    for (int i = 0; i < QS; i++) { k[i].load(next_k + i * KWORDS, kfirst, D); }
#pragma unroll
    for (int i = 0; i < VS; i++) { v[i].load(next_v + i * VALUES * VWORDS, vfirst, D); }
    if (KB > 0 && KG == 1 && !SIGNS) { load_scales<T, QS>(kscales, kscale); }
    if (VB > 0 && VG == 1) { load_scales<T, QS>(vscales, vscale); }
    if (CENTER) { load_center<T, D>(centers + ulong(tile * TILE / BLOCK) * D, at.lane, center); }
  }

  // Queries, times the scale: as they are for raw keys and centres, transformed for packed keys.
  float qscale = scale * LOG2E;
#pragma unroll
  for (int n = 0; n < QR; n++) {
    uint r = sg + uint(n) * NSG;
    if (r >= uint(RC)) { break; }
    float x[E];
    for (int e = 0; e < E; e++) {
      uint i = uint(e) * 32 + at.lane;
      x[e] = asked[n][e] * qscale;
      if (i < uint(DP)) { plain[r * DP + i] = x[e]; }
      if (KB > 0) { x[e] *= BALANCE ? turn[e] / weight[e] : turn[e]; }
    }
    if (KB > 0) { hadamard_hartley<D>(x, hartley, at.lane); }
    for (int i = int(at.lane); i < DP; i += 32) { turned[r * DP + i] = i < D ? x[(i / 32) % E] : 0.0f; }
    for (int i = E * 32 + int(at.lane); i < DP; i += 32) { plain[r * DP + i] = 0.0f; }
  }
  if (KB == 8) { for (uint i = tid; i < 256; i += 32 * NSG) { wide_k[i % (KB == 8 ? 256 : 1)] = codebook_8[i]; } }
  if (VB == 8) { for (uint i = tid; i < 256; i += 32 * NSG) { wide_v[i % (VB == 8 ? 256 : 1)] = codebook_8[i]; } }
#ifdef TURBOQUANT_BESIDE
  if (split == 0 && row0 == 0) {
    constexpr uint FOURS = RAW_WORDS / 4;
    for (uint i = tid; i < FEW * FOURS; i += 32 * NSG) {
      uint slot = i / FOURS;
      uint4 key = uint4(0u, 0u, 0u, 0u), value = key;
      if (slot < beside) {
        bool old = slot + 1 < beside;
        key = old ? ((const device uint4*)few_k)[head * (FEW * FOURS) + i]
                  : ((const device uint4*)new_k)[head * FOURS + i % FOURS];
        value = old ? ((const device uint4*)few_v)[head * (FEW * FOURS) + i]
                    : ((const device uint4*)new_v)[head * FOURS + i % FOURS];
      }
      ((device uint4*)out_few_k)[head * (FEW * FOURS) + i] = key;
      ((device uint4*)out_few_v)[head * (FEW * FOURS) + i] = value;
    }
  }
#endif
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float qv[RC][KD];
#pragma unroll
  for (int j = 0; j < RC; j++) {
#pragma unroll
    for (int d = 0; d < KD; d++) { qv[j][d] = (on_raw ? plain : turned)[(uint(j) ^ at.hx) * DP + at.ksub * KD + d]; }
  }
  float sv[RC][KD];  // the sketches, likewise
  if (SIGNS && !on_raw) {
#pragma unroll
    for (int j = 0; j < RC; j++) {
      uint r = row0 + (uint(j) ^ at.hx);
      bool live = r < rows && at.ksub * KD < uint(D);
#pragma unroll
      for (int d = 0; d < KD; d++) {
        sv[j][d] = live ? float(sketch[(head * rows + r) * D + at.ksub * KD + d]) * qscale : 0.0f;
      }
    }
  }
  Partial<RC, VD> part;
  part.top = NO_KEY;
  part.total = 0.0f;
#pragma unroll
  for (int g = 0; g < RC; g++) {
#pragma unroll
    for (int j = 0; j < VD; j++) { part.o[g][j] = 0.0f; }
  }
  threadgroup float* weights = (threadgroup float*)weight_rows + sg * TILE * RC;

  // Row hx as a query: what it may see.
  uint my_row = row0 + at.hx < rows ? row0 + at.hx : rows - 1;
  uint query = my_row % L;
  int last = CAUSAL ? int(tokens + query) - L : 0x7fffffff;
  ulong mask_row = ulong(b) * ulong(sizes[5]) + ulong(kvh * G + my_row / L) * ulong(sizes[6]) +
                   ulong(query) * ulong(sizes[7]);

  if (!on_raw) {
    float ktable = centroid_at<KB>(at.lane), vtable = centroid_at<VB>(at.lane);
    // Pointers that walk: a tile's rows are at constant distances from them, and need no arithmetic of their own.
    const device T* vgroups = v_scales + (base + ulong(tile * TILE + at.vkey)) * VG + vfirst / VSPAN;
    uint center_block = 0xffffffffu;
    float center_score = 0.0f;

    for (; tile < stop; tile++) {
      uint token = tile * TILE + at.kkey * QS;  // the lane's first key
      if (CENTER && tile * TILE / BLOCK != center_block) {
        center_block = tile * TILE / BLOCK;
        uint chx = at.lane / (32 / RC);
        float a[RC];
#pragma unroll
        for (int j = 0; j < RC; j++) { a[j] = 0.0f; }
#pragma unroll
        for (int e = 0; e < E; e++) {
          uint i = uint(e) * 32 + at.lane;
#pragma unroll
          for (int j = 0; j < RC; j++) { a[j] += i < uint(D) ? plain[(uint(j) ^ chx) * DP + i] * center[e] : 0.0f; }
        }
        if ((center_block + 1) * (BLOCK / TILE) < stop) {
          load_center<T, D>(centers + ulong(center_block + 1) * D, at.lane, center);
        }
        center_score = simd_shuffle(reduce_scatter<RC, 32>(a), ushort(at.hx * (32 / RC)));
      }

      float s[QS];
#pragma unroll
      for (int i = 0; i < QS; i++) {
        float a[RC];
#pragma unroll
        for (int j = 0; j < RC; j++) { a[j] = 0.0f; }
#pragma unroll
        for (int d = 0; d < KD; d++) {
          float c = k[i].value(d, ktable, wide_k);
#pragma unroll
          for (int j = 0; j < RC; j++) { a[j] = fma(qv[j][d], c, a[j]); }
        }
        if (KB > 0 && KG > 1) {
          float group = float(kscales[i * KNUMBERS]);
#pragma unroll
          for (int j = 0; j < RC; j++) { a[j] *= group; }
        }
        if (SIGNS) {  // loaded here, not with the tile's codes, which took registers beyond 168 on CUDA
          Plane<1, KD> plus;
          plus.load(next_k + i * KWORDS + CODE_WORDS, kfirst);
          float numbers[2];  // scale, t
          load_scales<T, 2>(kscales + i * KNUMBERS, numbers);
#pragma unroll
          for (int j = 0; j < RC; j++) { a[j] *= numbers[0]; }
          uint minus = as_type<uint>(numbers[1]) ^ 0x80000000u;
#pragma unroll
          for (int d = 0; d < KD; d++) {
            float c = as_type<float>(((plus.words[0] << (31 - d)) & 0x80000000u) ^ minus);  // bit 1: t, bit 0: -t
#pragma unroll
            for (int j = 0; j < RC; j++) { a[j] = fma(sv[j][d], c, a[j]); }
          }
        }
        s[i] = reduce_scatter<RC, KL>(a);
        if (KB > 0 && KG == 1 && !SIGNS) { s[i] *= kscale[i]; }
        if (CENTER) { s[i] += center_score; }
        if (MASK > 0 || CAUSAL) { s[i] = masked<MASK>(s[i], mask, mask_row, sinks + token + i, last); }
      }
      next_k += TILE * KWORDS;
      kscales += TILE * KNUMBERS;
      if (tile + 1 < stop) {
#pragma unroll
        for (int i = 0; i < QS; i++) { k[i].load(next_k + i * KWORDS, kfirst, D); }
        if (KB > 0 && KG == 1 && !SIGNS) { load_scales<T, QS>(kscales, kscale); }
      }
      softmax_step<RC, VD, KL, QS>(part, s, vscale, weights, at);
      vscales += TILE * VG;
      if (VB > 0 && VG == 1 && tile + 1 < stop) { load_scales<T, QS>(vscales, vscale); }
#pragma unroll
      for (int i = 0; i < VS; i++) {
        float p[RC];
        load_weights<RC>(weights + (i * VALUES + at.vkey) * RC, p);
        if (VB > 0 && VG > 1) {
          float group = float(vgroups[i * VALUES * VG]);
#pragma unroll
          for (int g = 0; g < RC; g++) { p[g] *= group; }
        }
#pragma unroll
        for (int j = 0; j < VD; j++) {
          float c = v[i].value(j, vtable, wide_v);
#pragma unroll
          for (int g = 0; g < RC; g++) { part.o[g][j] = fma(p[g], c, part.o[g][j]); }
        }
      }
      next_v += TILE * VWORDS;
      vgroups += TILE * VG;
      if (tile + 1 < stop) {
#pragma unroll
        for (int i = 0; i < VS; i++) { v[i].load(next_v + i * VALUES * VWORDS, vfirst, D); }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  } else {
    float one[QS];
#pragma unroll
    for (int i = 0; i < QS; i++) { one[i] = 1.0f; }
    for (; tile < stop; tile++) {
      Run<T, 0, VD> raw_values[VS];
#pragma unroll
      for (int i = 0; i < VS; i++) {
        raw_values[i].load(raw_v.at<RAW_WORDS>(min(tile * TILE + i * VALUES + at.vkey, raw - 1)), vfirst, D);
      }
      float s[QS];
#pragma unroll
      for (int i = 0; i < QS; i++) {
        uint n = tile * TILE + at.kkey * QS + i;
        Run<T, 0, KD> key;
        key.load(raw_k.at<RAW_WORDS>(min(n, raw - 1)), kfirst, D);
        float a[RC];
#pragma unroll
        for (int j = 0; j < RC; j++) { a[j] = 0.0f; }
#pragma unroll
        for (int d = 0; d < KD; d++) {
          float c = key.value(d, 0.0f, wide_k);
#pragma unroll
          for (int j = 0; j < RC; j++) { a[j] = fma(qv[j][d], c, a[j]); }
        }
        s[i] = reduce_scatter<RC, KL>(a);
        uint position = n < sinks ? n : n + packed;
        if (n >= raw) { s[i] = MASKED; }
        if ((MASK > 0 || CAUSAL) && n < raw) { s[i] = masked<MASK>(s[i], mask, mask_row, position, last); }
      }
      softmax_step<RC, VD, KL, QS>(part, s, one, weights, at);
#pragma unroll
      for (int i = 0; i < VS; i++) {
        float p[RC];
        load_weights<RC>(weights + (i * VALUES + at.vkey) * RC, p);
#pragma unroll
        for (int j = 0; j < VD; j++) {
          float c = raw_values[i].value(j, 0.0f, wide_v);
#pragma unroll
          for (int g = 0; g < RC; g++) { part.o[g][j] = fma(p[g], c, part.o[g][j]); }
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  // Add up the lanes that took different keys, then the simdgroups.
#pragma unroll
  for (int step = VL; step < 32; step *= 2) {
#pragma unroll
    for (int g = 0; g < RC; g++) {
#pragma unroll
      for (int j = 0; j < VD; j++) { part.o[g][j] += simd_shuffle_xor(part.o[g][j], ushort(step)); }
    }
  }
#pragma unroll
  for (int step = KL; step < 32; step *= 2) { part.total += simd_shuffle_xor(part.total, ushort(step)); }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the queries are dead from here
  if (at.vkey == 0) {
#pragma unroll
    for (int g = 0; g < RC; g++) {
#pragma unroll
      for (int j = 0; j < VD; j++) { shared_rows[(sg * RC + g) * DP + at.vsub * VD + j] = part.o[g][j]; }
    }
  }
  if (at.kkey == 0 && at.ksub % (KL / RC) == 0) {
    tops[sg * RC + at.hx] = part.top;
    totals[sg * RC + at.hx] = part.total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // One simdgroup per query row.
  for (uint r = sg; r < uint(RC); r += NSG) {
    if (row0 + r >= rows) { break; }
    float top = NO_KEY;
    for (uint s = 0; s < uint(NSG); s++) { top = max(top, tops[s * RC + r]); }
    float logit = 0.0f;
    if (SINGLE && LOGITS) {
      logit = float(logits[kvh * G + (row0 + r) / L]) * LOG2E;
      top = max(top, logit);
    }
    float total = SINGLE && LOGITS ? fast::exp2(logit - top) : 0.0f;
    float sum[E], raw_sum[E];
    for (int e = 0; e < E; e++) { sum[e] = raw_sum[e] = 0.0f; }
    for (uint s = 0; s < uint(NSG); s++) {
      float f = fast::exp2(tops[s * RC + r] - top);
      total += f * totals[s * RC + r];
      for (int e = 0; e < E; e++) {
        uint i = uint(e) * 32 + at.lane;
        float x = i < uint(D) ? f * shared_rows[(s * RC + r) * DP + i] : 0.0f;
        if (SINGLE && s >= packed_workers) { raw_sum[e] += x; } else { sum[e] += x; }
      }
    }
    ulong row = head * rows + row0 + r;
    if (SINGLE) {
      if (VB > 0) { hadamard_hartley<D>(sum, hartley, at.lane); }
      for (int e = 0; e < E; e++) {
        uint i = uint(e) * 32 + at.lane;
        if (i < uint(D)) {
          float x = (VB > 0 ? sum[e] * signs[i] : sum[e]) + raw_sum[e];
          out[row * D + i] = O(total > 0.0f ? within(x / total, (const device O*)out) : 0.0f);
        }
      }
    } else {
      row = (row * threadgroups_per_grid.x + split) * (D + 2);
      for (int e = 0; e < E; e++) {
        uint i = uint(e) * 32 + at.lane;
        if (i < uint(D)) { out[row + i] = O(sum[e]); }
      }
      if (at.lane == 0) {
        out[row + D] = O(top);
        out[row + D + 1] = O(total);
      }
    }
  }
