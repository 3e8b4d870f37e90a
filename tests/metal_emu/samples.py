"""Two kernels as a project would ship them, with numpy references: rotate-and-quantize, and split attention.

Their arguments are numpy arrays. Each runner takes old -> new replacements of text, to seed a bug, and options.
"""

from __future__ import annotations

import numpy as np

from .kernel import MetalKernel, metal_kernel

D = 128

# Walsh-Hadamard transform of rows, absolute maximum of 16 values as their scale, 4-bit codes packed eight a word.
ENCODE_HEADER = """
template <int N>
METAL_FUNC void butterfly(thread float (&v)[N]) {
  for (int h = 1; h < N; h <<= 1) {
    for (int i = 0; i < N; i++) {
      if ((i & h) == 0) {
        float a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
    }
  }
}
"""
ENCODE_SOURCE = """
  constexpr int D = 128;
  constexpr int PER = D / 32;                       // 4 values per lane
  threadgroup float sgn[D];
  threadgroup ushort stage[NSG * 32];
  uint lane = thread_index_in_simdgroup;
  uint sg = simdgroup_index_in_threadgroup;
  for (uint i = thread_index_in_threadgroup; i < uint(D); i += NSG * 32) {
    sgn[i] = signs[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  uint rows = uint(x_shape[0]);
  uint row = threadgroup_position_in_grid.x * NSG + sg;
  if (row >= rows) {
    return;                                         // whole simdgroup leaves
  }
  const device T* xr = x + row * D + lane * PER;
  float v[PER];
  for (int j = 0; j < PER; j++) {
    v[j] = float(xr[j]) * sgn[lane * PER + j];
  }
  butterfly<PER>(v);
  for (ushort m = 1; m < 32; m <<= 1) {
    for (int j = 0; j < PER; j++) {
      float o = simd_shuffle_xor(v[j], m);
      v[j] = (lane & m) ? o - v[j] : v[j] + o;
    }
  }
  float amax = 0;
  for (int j = 0; j < PER; j++) {
    v[j] *= 0.08838834764831845f;                   // 1/sqrt(128)
    amax = max(amax, abs(v[j]));
  }
  amax = max(amax, simd_shuffle_xor(amax, 1));      // 4 lanes = one group of 16
  amax = max(amax, simd_shuffle_xor(amax, 2));
  half sc = half(amax / 7.0f);
  float inv = sc > 0.0h ? 1.0f / float(sc) : 0.0f;
  uint packed = 0;
  for (int j = 0; j < PER; j++) {
    int q = clamp(int(rint(v[j] * inv)), -8, 7) + 8;
    packed |= uint(q) << (4 * j);
  }
  stage[sg * 32 + lane] = ushort(packed);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (lane < 16) {
    uint lo = stage[sg * 32 + 2 * lane], hi = stage[sg * 32 + 2 * lane + 1];
    out[row * 16 + lane] = lo | (hi << 16);
  }
  if ((lane & 3) == 0) {
    scales[row * 8 + lane / 4] = sc;
  }
"""

# Attention of one query over 4-bit codes of a codebook: keys split over threadgroups, then their parts are merged.
ATTEND_HEADER = """
METAL_FUNC float4 load4(const device uint* p, uint d, threadgroup const float* cb) {
  uint w = p[d >> 3] >> (4 * (d & 7));             // 4 nibbles
  return float4(cb[w & 15], cb[(w >> 4) & 15], cb[(w >> 8) & 15], cb[(w >> 12) & 15]);
}
"""
ATTEND_SOURCE = """
  constexpr int D = 128;
  constexpr int W = D / 8;                          // packed words per token
  threadgroup float cb[32];
  threadgroup float red_o[NSG * G * D];
  threadgroup float red_m[NSG * G];
  threadgroup float red_l[NSG * G];
  uint lane = thread_index_in_simdgroup;
  uint sg = simdgroup_index_in_threadgroup;
  uint split = threadgroup_position_in_grid.x;
  uint kvh = threadgroup_position_in_grid.y;
  uint nsplit = threadgroups_per_grid.x;
  uint N = uint(k_packed_shape[1]);
  if (thread_index_in_threadgroup < 32) {
    uint i = thread_index_in_threadgroup;
    cb[i] = i < 16 ? k_codebook[i] : v_codebook[i - 16];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float4 qv[G];
  float4 o[G];
  float m[G], l[G];
  for (int g = 0; g < G; g++) {
    const device T* qp = q + (kvh * G + g) * D + lane * 4;
    qv[g] = float4(float(qp[0]), float(qp[1]), float(qp[2]), float(qp[3])) * float(scale);
    o[g] = float4(0.0f);
    m[g] = -INFINITY;
    l[g] = 0.0f;
  }
  uint chunk = (N + nsplit - 1) / nsplit;
  uint t0 = split * chunk, t1 = min(N, t0 + chunk);
  for (uint t = t0 + sg; t < t1; t += NSG) {
    uint tok = kvh * N + t;
    float4 kv = load4(k_packed + tok * W, lane * 4, cb) * float(k_scale[tok]);
    float4 vv = load4(v_packed + tok * W, lane * 4, cb + 16) * float(v_scale[tok]);
    for (int g = 0; g < G; g++) {
      float s = simd_sum(dot(qv[g], kv));
      float nm = max(m[g], s);
      float f = fast::exp(m[g] - nm);
      float p = fast::exp(s - nm);
      m[g] = nm;
      l[g] = l[g] * f + p;
      o[g] = o[g] * f + p * vv;
    }
  }
  for (int g = 0; g < G; g++) {
    threadgroup float* ro = red_o + (sg * G + g) * D + lane * 4;
    ro[0] = o[g].x; ro[1] = o[g].y; ro[2] = o[g].z; ro[3] = o[g].w;
    if (lane == 0) {
      red_m[sg * G + g] = m[g];
      red_l[sg * G + g] = l[g];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index_in_threadgroup; i < uint(G * D); i += NSG * 32) {
    uint g = i / D, d = i % D;
    float mm = -INFINITY;
    for (uint s = 0; s < NSG; s++) mm = max(mm, red_m[s * G + g]);
    float acc = 0.0f, ll = 0.0f;
    for (uint s = 0; s < NSG; s++) {
      float ms = red_m[s * G + g];
      float f = ms == -INFINITY ? 0.0f : fast::exp(ms - mm);
      acc += f * red_o[(s * G + g) * D + d];
      ll += f * red_l[s * G + g];
    }
    uint row = (kvh * G + g) * nsplit + split;
    part_o[row * D + d] = acc;
    if (d == 0) {
      part_m[row] = mm;
      part_l[row] = ll;
    }
  }
"""
MERGE_SOURCE = """
  constexpr int D = 128;
  uint d = thread_position_in_threadgroup.x;
  uint h = threadgroup_position_in_grid.x;
  int S = part_m_shape[1];
  float mm = -INFINITY;
  for (int s = 0; s < S; s++) mm = max(mm, part_m[h * S + s]);
  float acc = 0.0f, ll = 0.0f;
  for (int s = 0; s < S; s++) {
    float f = part_m[h * S + s] == -INFINITY ? 0.0f : fast::exp(part_m[h * S + s] - mm);
    acc += f * part_o[(h * S + s) * D + d];
    ll += f * part_l[h * S + s];
  }
  out[h * D + d] = static_cast<T>(acc / ll);
"""


def _kernel(name, inputs, outputs, source, header, replace) -> MetalKernel:
    """The kernel with (old, new) pieces of text replaced, each once."""
    for old, new in replace:
        if old not in source + header:
            raise ValueError(f"[samples] wanted a piece of the kernel to replace, got {old!r}.")
        source, header = source.replace(old, new, 1), header.replace(old, new, 1)
    return metal_kernel(name, inputs, outputs, source, header=header)


def encode(x, signs, *replace, simdgroups=4, **options):
    """Codes (rows, 16) uint32 and scales (rows, 8) float16 of x (rows, 128); signs (128,) float32."""
    kernel = _kernel("encode", ["x", "signs"], ["out", "scales"], ENCODE_SOURCE, ENCODE_HEADER, replace)
    rows, size = len(x), 32 * simdgroups
    return kernel(
        inputs=[x, signs],
        template=[("T", x.dtype), ("NSG", simdgroups)],
        grid=(-(-rows // simdgroups) * size, 1, 1),
        threadgroup=(size, 1, 1),
        output_shapes=[(rows, 16), (rows, 8)],
        output_dtypes=[np.uint32, np.float16],
        **options,
    )


def encode_reference(x, signs):
    """What ``encode`` gives, bit for bit."""
    v, h = x.astype(np.float32) * signs, 1
    while h < D:
        v = v.reshape(len(x), -1, 2, h)
        v = np.stack([v[:, :, 0] + v[:, :, 1], v[:, :, 0] - v[:, :, 1]], 2)
        h *= 2
    groups = (v.reshape(len(x), D) * np.float32(0.08838834764831845)).reshape(len(x), 8, 16)
    scales = (np.abs(groups).max(-1) / np.float32(7)).astype(np.float16)
    inverse = np.where(scales > 0, np.float32(1) / np.where(scales > 0, scales, 1).astype(np.float32), 0)
    codes = np.clip(np.rint(groups * inverse.astype(np.float32)[..., None]), -8, 7).astype(np.int32) + 8
    codes = codes.reshape(len(x), 16, 8).astype(np.uint32)
    return (codes << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32), scales


def attention_inputs(kv_heads, group, tokens, seed=0):
    """Random queries, packed keys and their scales, packed values and theirs, two codebooks, and the score's scale."""
    random = np.random.default_rng(seed)
    codebook = np.sort(random.standard_normal(16)).astype(np.float32)
    codes = [random.integers(0, 2**32, (kv_heads, tokens, D // 8), dtype=np.uint32) for _ in range(2)]
    scales = [random.uniform(0.5, 1.5, (kv_heads, tokens)).astype(np.float16) for _ in range(2)]
    queries = random.standard_normal((kv_heads * group, D)).astype(np.float16)
    rest = [codebook, (codebook * 0.9).astype(np.float32), np.float32(D**-0.5)]
    return [queries, codes[0], scales[0], codes[1], scales[1], *rest]


def attend(inputs, *replace, splits=4, simdgroups=8, **options):
    """The attention output (query heads, 128) float32 of ``attention_inputs``."""
    kv_heads, heads, size = len(inputs[1]), len(inputs[0]), 32 * simdgroups
    names = ["q", "k_packed", "k_scale", "v_packed", "v_scale", "k_codebook", "v_codebook", "scale"]
    parts = ["part_o", "part_m", "part_l"]
    first = _kernel("attend", names, parts, ATTEND_SOURCE, ATTEND_HEADER, replace)
    computed = first(
        inputs=inputs,
        template=[("T", np.float16), ("G", heads // kv_heads), ("NSG", simdgroups)],
        grid=(splits * size, kv_heads, 1),
        threadgroup=(size, 1, 1),
        output_shapes=[(heads, splits, D), (heads, splits), (heads, splits)],
        output_dtypes=[np.float32] * 3,
        **options,
    )
    return metal_kernel("merge", parts, ["out"], MERGE_SOURCE)(
        inputs=computed,
        template=[("T", np.float32)],
        grid=(heads * D, 1, 1),
        threadgroup=(D, 1, 1),
        output_shapes=[(heads, D)],
        output_dtypes=[np.float32],
        **options,
    )[0]


def attention_reference(q, k, k_scale, v, v_scale, k_codebook, v_codebook, scale):
    """What ``attend`` approximates, in float32."""

    def unpack(packed):
        return ((packed[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15).reshape(*packed.shape[:-1], D)

    keys = k_codebook[unpack(k)] * k_scale[..., None].astype(np.float32)
    values = v_codebook[unpack(v)] * v_scale[..., None].astype(np.float32)
    scores = np.einsum("hgd,hnd->hgn", q.astype(np.float32).reshape(len(k), -1, D) * scale, keys)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (np.einsum("hgn,hnd->hgd", weights, values) / weights.sum(-1, keepdims=True)).reshape(-1, D)
