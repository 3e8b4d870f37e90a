# ruff: noqa: E501
"""Source generation: a line-for-line port of MLX's write_signature
(mlx/backend/common/metal_kernel.cpp, v0.32), plus the two host variants."""

from __future__ import annotations

import re

TYPE = {
    "float32": "float",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "float64": "double",
    "complex64": "complex64_t",
    "bool": "bool",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
}
ATTRS = [
    ("dispatch_quadgroups_per_threadgroup", "uint"),
    ("dispatch_simdgroups_per_threadgroup", "uint"),
    ("dispatch_threads_per_threadgroup", "uint3"),
    ("grid_origin", "uint3"),
    ("grid_size", "uint3"),
    ("quadgroup_index_in_threadgroup", "uint"),
    ("quadgroups_per_threadgroup", "uint"),
    ("simdgroup_index_in_threadgroup", "uint"),
    ("simdgroups_per_threadgroup", "uint"),
    ("thread_execution_width", "uint"),
    ("thread_index_in_quadgroup", "uint"),
    ("thread_index_in_simdgroup", "uint"),
    ("thread_index_in_threadgroup", "uint"),
    ("thread_position_in_grid", "uint3"),
    ("thread_position_in_threadgroup", "uint3"),
    ("threadgroup_position_in_grid", "uint3"),
    ("threadgroups_per_grid", "uint3"),
    ("threads_per_grid", "uint3"),
    ("threads_per_simdgroup", "uint"),
    ("threads_per_threadgroup", "uint3"),
]
MAX_CONSTANT = 8


class Arg:  # what codegen needs to know about one input
    def __init__(self, name, dtype, ndim, size):
        self.name, self.dtype, self.ndim, self.size = name, dtype, ndim, size


def shape_infos(names, source):
    return [(n + "_shape" in source, n + "_strides" in source, n + "_ndim" in source) for n in names]


def attributes(source):
    return [(a, t) for a, t in ATTRS if a in source]


def params(args, infos):
    """(declaration, kind, input index) for every input-side kernel parameter."""
    out = []
    for i, (a, inf) in enumerate(zip(args, infos, strict=False)):
        loc = "constant" if a.size < MAX_CONSTANT else "device"
        out.append((f"const {loc} {TYPE[a.dtype]}{'&' if a.ndim == 0 else '*'} {a.name}", "data", i))
        if a.ndim > 0:
            if inf[0]:
                out.append((f"const constant int* {a.name}_shape", "shape", i))
            if inf[1]:
                out.append((f"const constant int64_t* {a.name}_strides", "strides", i))
            if inf[2]:
                out.append((f"const constant int& {a.name}_ndim", "ndim", i))
    return out


def tmpl_str(v):
    if isinstance(v, bool):
        return "1" if v else "0"  # std::ostringstream << bool
    return str(v) if isinstance(v, int) else TYPE[v]


def kernel_name(name, template, args, out_dtypes):
    k = "custom_kernel_" + name
    if template:
        d = "<" + ", ".join(tmpl_str(v) for _, v in template) + ">"
        h = d.replace("<", "_").replace(">", "_").replace(", ", "_")
        k += "_" + h[:-1]
    for a in args:
        k += "_" + TYPE[a.dtype]
        if a.ndim == 0:
            k += "s"
        elif a.size < MAX_CONSTANT:
            k += "c"
    for d in out_dtypes:
        k += "_" + TYPE[d]
    return k


def metal_source(name, header, source, args, out_names, out_dtypes, template, atomic_outputs, body=None, pre=""):
    """Exactly what MLX hands to the Metal compiler (without metal::utils())."""
    infos = shape_infos([a.name for a in args], source)
    attrs = attributes(source)
    kname = kernel_name(name, template, args, out_dtypes)
    s = header
    if template:
        s += (
            "template <"
            + ", ".join(
                ("bool" if isinstance(v, bool) else "int" if isinstance(v, int) else "typename") + " " + n
                for n, v in template
            )
            + ">\n"
        )
    s += "[[kernel]] void " + kname + "(\n"
    idx = 0
    for decl, _, _ in params(args, infos):
        s += f"  {decl} [[buffer({idx})]],\n"
        idx += 1
    for n, d in zip(out_names, out_dtypes, strict=False):
        t = TYPE[d]
        s += "  device " + (f"atomic<{t}>" if atomic_outputs else t) + f"* {n} [[buffer({idx})]]"
        # (MLX compares the running buffer index here, not the output index)
        s += ",\n" if idx < len(args) + len(out_names) - 1 or attrs else ") {\n"
        idx += 1
    for i, (a, t) in enumerate(attrs):
        s += f"  {t} {a} [[{a}]]" + (",\n" if i < len(attrs) - 1 else ") {\n")
    s += pre + (source if body is None else body)
    s += "\n}\n"
    if template:
        td = kname + "<" + ", ".join(tmpl_str(v) for _, v in template) + ">"
        s += f'\ntemplate [[host_name("{kname}")]] [[kernel]] decltype({td}) {td};\n'
    return s


# ---------------------------------------------------------------- source rewriting (run variant only)
TOK = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|^[ \t]*\#(?:[^\n\\]|\\\n|\\.)*|[A-Za-z_]\w*|0[xX][0-9a-fA-F]+\w*|\d[\w.]*|\s+|::|<<|>>|&&|.",
    re.S | re.M,
)


def tokens(src):
    return [m.group(0) for m in TOK.finditer(src)]


def _skip(t):
    return t.isspace() or t.startswith("//") or t.startswith("/*")


def rewrite_threadgroup(src, n=0):
    """`threadgroup T x[N];` at statement level -> static storage in section msl_tg (with a red zone in front)."""
    toks, out, prev = tokens(src), [], None
    for i, t in enumerate(toks):
        if t == "threadgroup" and (
            prev is None or prev in ";{})" or prev in ("const", "volatile") or prev.startswith("#")
        ):
            depth, ptr, end = 0, False, None
            for u in toks[i + 1 :]:
                if _skip(u):
                    continue
                if u == "<":
                    depth += 1
                elif u == ">":
                    depth -= 1
                elif u == ">>":
                    depth -= 2
                elif depth == 0 and u in "*&":
                    ptr = True
                elif depth == 0 and u in (";", "=", "[", ",", ")", "{", "("):
                    end = u
                    break
            if not ptr and end in (";", "[", ",", "="):
                out.append(f"MSL_RZ({n}) static MSL_TG ")
                n += 1
        out.append(t)
        if not _skip(t):
            prev = t
    return "".join(out), n


def rewrite_vec_ctor(src):
    """vec<T, N>(...) -> ::metal::__vctor<T, N>(...)  (clang vectors have no multi-argument constructor syntax)."""
    toks, out, i = tokens(src), [], 0
    while i < len(toks):
        if toks[i] == "vec":
            j, depth = i + 1, 0
            while j < len(toks):
                depth += {"<": 1, ">": -1, ">>": -2}.get(toks[j], 0)
                j += 1
                if depth <= 0:
                    break
            k = j
            while k < len(toks) and _skip(toks[k]):
                k += 1
            if j > i + 2 and k < len(toks) and toks[k] == "(":
                if out and out[-1] == "::" and len(out) > 1 and out[-2] == "metal":
                    out = out[:-2]
                out.append("::metal::__vctor")
                i += 1
                continue
        out.append(toks[i])
        i += 1
    return "".join(out)


def rewrite_function_constants(src, values=None):
    """`constant bool f [[function_constant(3)]];` -> initialised constant (what MTLFunctionConstantValues does)."""
    v = values or {}
    return re.sub(
        r"constant\s+(bool|int|uint|float|short|ushort)\s+(\w+)\s*\[\[\s*function_constant\(\w+\)\s*\]\]\s*;",
        lambda m: f"constant {m[1]} {m[2]} = {int(v.get(m[2], 0))};",
        src,
    )


CTX = [
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
]
CTX1 = [
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
]
ALIAS = {
    "grid_size": "uint3(c->threads_per_grid.x, c->threads_per_grid.y, c->threads_per_grid.z)",
    "grid_origin": "uint3(0)",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "(c->thread_index_in_threadgroup & 3)",
    "quadgroup_index_in_threadgroup": "(c->thread_index_in_threadgroup >> 2)",
    "quadgroups_per_threadgroup": "((c->threads_per_threadgroup.x * c->threads_per_threadgroup.y * c->threads_per_threadgroup.z + 3) / 4)",
    "dispatch_quadgroups_per_threadgroup": "((c->dispatch_threads_per_threadgroup.x * c->dispatch_threads_per_threadgroup.y * c->dispatch_threads_per_threadgroup.z + 3) / 4)",
}
PRE = """#include "mlx/backend/metal/kernels/utils.h"
#define MSL_TG __attribute__((section("msl_tg"), used, aligned(16)))
#define MSL_RZ(n) static MSL_TG char __msl_rz_##n[256];
struct MslU3 {{ uint x, y, z; }};
struct MslCtx {{ MslU3 {}; uint {}; }};
""".format(", ".join(CTX), ", ".join(CTX1))


def attr_expr(a):
    if a in ALIAS:
        return ALIAS[a]
    return f"uint3(c->{a}.x, c->{a}.y, c->{a}.z)" if a in CTX else f"c->{a}"


def run_source(name, header, source, args, out_names, out_dtypes, template, atomic_outputs):
    header, ntg = rewrite_threadgroup(rewrite_vec_ctor(header))
    body, ntg = rewrite_threadgroup(rewrite_vec_ctor(source), ntg)
    hdr = f'#line 1 "{name}.header"\n' + header + "\n" if header else ""
    src = metal_source(
        name,
        hdr,
        source,
        args,
        out_names,
        out_dtypes,
        template,
        atomic_outputs,
        body=body,
        pre=f'#line 1 "{name}.metal"\n',
    )
    src = re.sub(r"\ntemplate \[\[host_name.*\n$", "\n", src)
    infos = shape_infos([a.name for a in args], source)
    kname = kernel_name(name, template, args, out_dtypes)
    call, i = [], 0
    for decl, _, _ in params(args, infos):
        ty = decl.rsplit(" ", 1)[0]
        call.append(f"*({ty[:-1]}*)b[{i}]" if ty.endswith("&") else f"({ty})b[{i}]")
        i += 1
    for d in out_dtypes:
        t = TYPE[d]
        call.append(f"(device {'atomic<' + t + '>' if atomic_outputs else t}*)b[{i}]")
        i += 1
    call += [attr_expr(a) for a, _ in attributes(source)]
    targs = "<" + ", ".join(tmpl_str(v) for _, v in template) + ">" if template else ""
    src += f'\n#line 1 "thunk"\nextern "C" __attribute__((no_sanitize("thread","undefined"))) void __msl_entry(void** b, const MslCtx* c) {{ {kname}{targs}({", ".join(call)}); }}\n'
    return PRE + src, ntg


def check_source(name, header, source, args, out_names, out_dtypes, template, atomic_outputs):
    """C++ for OpenCL variant: a real __kernel so that threadgroup variables are legal where Metal allows them."""
    infos = shape_infos([a.name for a in args], source)
    s = '#include "mlx/backend/metal/kernels/utils.h"\n'
    if header:
        s += f'#line 1 "{name}.header"\n' + rewrite_vec_ctor(header) + "\n"
    s += f"__kernel void {kernel_name(name, template, args, out_dtypes)}() {{\n"
    for n, v in template or []:
        s += (
            f"constexpr {'bool' if isinstance(v, bool) else 'int'} {n} = {tmpl_str(v)};\n"
            if isinstance(v, int)
            else f"typedef {TYPE[v]} {n};\n"
        )
    for decl, _, _ in params(args, infos):
        ty, n = decl.rsplit(" ", 1)
        s += f"{ty} {n} = *({ty[:-1]}*)8;\n" if ty.endswith("&") else f"{ty} {n} = ({ty})8;\n"
    for n, d in zip(out_names, out_dtypes, strict=False):
        t = TYPE[d]
        t = f"atomic<{t}>" if atomic_outputs else t
        s += f"device {t}* {n} = (device {t}*)8;\n"
    for a, t in attributes(source):
        s += f"{t} {a} = ({t})1;\n"
    return s + f'#line 1 "{name}.metal"\n' + rewrite_vec_ctor(source) + "\n}\n"
