# ruff: noqa: E501
"""Two realistic kernels, written the way the project would ship them."""

import numpy as np

# ---------------------------------------------------------------- (i) WHT(128) + group-16 absmax quantise + 4-bit pack
WHT_HEADER = """
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
WHT_SOURCE = """
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


def wht_numpy(x, signs):
    v = x.astype(np.float32) * signs
    h = 1
    while h < 128:
        v = v.reshape(len(x), -1, 2, h)
        v = np.stack([v[:, :, 0] + v[:, :, 1], v[:, :, 0] - v[:, :, 1]], 2).reshape(len(x), 128)
        h *= 2
    v = v * np.float32(0.08838834764831845)
    g = v.reshape(len(x), 8, 16)
    sc = (np.abs(g).max(-1) / np.float32(7)).astype(np.float16)
    inv = np.where(sc > 0, np.float32(1) / np.where(sc > 0, sc, 1).astype(np.float32), 0).astype(np.float32)
    q = np.clip(np.rint(g * inv[..., None]), -8, 7).astype(np.int32) + 8
    q = q.reshape(len(x), 16, 8).astype(np.uint32)
    return (q << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32), sc


# ---------------------------------------------------------------- (ii) split-K decode attention over 4-bit codebook KV
ATT1_HEADER = """
METAL_FUNC float4 load4(const device uint* p, uint d, threadgroup const float* cb) {
  uint w = p[d >> 3] >> (4 * (d & 7));             // 4 nibbles
  return float4(cb[w & 15], cb[(w >> 4) & 15], cb[(w >> 8) & 15], cb[(w >> 12) & 15]);
}
"""
ATT1_SOURCE = """
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
    cb[thread_index_in_threadgroup] = thread_index_in_threadgroup < 16 ? k_codebook[thread_index_in_threadgroup] : v_codebook[thread_index_in_threadgroup - 16];
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
ATT2_SOURCE = """
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
ATT1_IN = ["q", "k_packed", "k_scale", "v_packed", "v_scale", "k_codebook", "v_codebook", "scale"]
ATT1_OUT = ["part_o", "part_m", "part_l"]
ATT2_IN = ["part_o", "part_m", "part_l"]


def att_inputs(Hkv, G, N, seed=0):
    r = np.random.default_rng(seed)
    D = 128
    q = r.standard_normal((Hkv * G, D)).astype(np.float16)
    kp = r.integers(0, 2**32, (Hkv, N, D // 8), dtype=np.uint32)
    vp = r.integers(0, 2**32, (Hkv, N, D // 8), dtype=np.uint32)
    ks = r.uniform(0.5, 1.5, (Hkv, N)).astype(np.float16)
    vs = r.uniform(0.5, 1.5, (Hkv, N)).astype(np.float16)
    cb = np.sort(r.standard_normal(16)).astype(np.float32)
    return [q, kp, ks, vp, vs, cb, (cb * 0.9).astype(np.float32), np.float32(D**-0.5)]


def att_numpy(q, kp, ks, vp, vs, kc, vc, scale, G):
    D = 128

    def un(p):
        return ((p[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15).reshape(*p.shape[:-1], D)

    k = kc[un(kp)] * ks[..., None].astype(np.float32)
    v = vc[un(vp)] * vs[..., None].astype(np.float32)
    qf = q.astype(np.float32).reshape(len(kp), G, D) * scale
    s = np.einsum("hgd,hnd->hgn", qf, k)
    p = np.exp(s - s.max(-1, keepdims=True))
    return (np.einsum("hgn,hnd->hgd", p, v) / p.sum(-1, keepdims=True)).reshape(-1, D)


def run_wht(mk, x, signs, nsg=4, **kw):
    k = mk("wht128_q4", ["x", "signs"], ["out", "scales"], WHT_SOURCE, header=WHT_HEADER)
    rows = len(x)
    n = (rows + nsg - 1) // nsg
    r = k(
        inputs=[x, signs],
        template=[("T", x.dtype), ("NSG", nsg)],
        grid=(n * nsg * 32, 1, 1),
        threadgroup=(nsg * 32, 1, 1),
        output_shapes=[(rows, 16), (rows, 8)],
        output_dtypes=[np.uint32, np.float16],
        **kw,
    )
    return r, k


def run_att(mk, ins, G, nsplit=4, nsg=8, **kw):
    Hkv = ins[1].shape[0]
    k1 = mk("attn_q4_p1", ATT1_IN, ATT1_OUT, ATT1_SOURCE, header=ATT1_HEADER)
    k2 = mk("attn_q4_p2", ATT2_IN, ["out"], ATT2_SOURCE)
    p = k1(
        inputs=ins,
        template=[("T", np.float16), ("G", G), ("NSG", nsg)],
        grid=(nsplit * nsg * 32, Hkv, 1),
        threadgroup=(nsg * 32, 1, 1),
        output_shapes=[(Hkv * G, nsplit, 128), (Hkv * G, nsplit), (Hkv * G, nsplit)],
        output_dtypes=[np.float32] * 3,
        **kw,
    )
    o = k2(
        inputs=p,
        template=[("T", np.float32)],
        grid=(Hkv * G * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(Hkv * G, 128)],
        output_dtypes=[np.float32],
        **kw,
    )
    return o[0], (k1, k2)
