# ruff: noqa: E501
"""Static checks: clang's C++ for OpenCL front end (real address spaces) + AST rules + token rules."""

from __future__ import annotations

import hashlib
import json
import re

from . import build
from . import codegen as cg

BANNED = {  # token -> why
    "double": "Metal has no double",
    "goto": "goto is not allowed in MSL",
    "new": "no dynamic allocation in MSL",
    "delete": "no dynamic allocation in MSL",
    "try": "no exceptions in MSL",
    "catch": "no exceptions in MSL",
    "throw": "no exceptions in MSL",
    "dynamic_cast": "no RTTI in MSL",
    "typeid": "no RTTI in MSL",
    "virtual": "no virtual functions in MSL",
    "thread_local": "not in MSL",
    "asm": "no inline assembly",
    "__global": "OpenCL spelling",
    "__local": "OpenCL spelling",
    "__private": "OpenCL spelling",
    "__constant": "OpenCL spelling",
    "__shared__": "CUDA spelling",
    "__syncthreads": "CUDA spelling",
    "printf": "not in MSL",
    "std": "use metal::, there is no std:: in MSL",
    "register": "not in MSL",
    "float64_t": "Metal has no double",
}
CL_KEYWORDS = {
    "global",
    "local",
    "private_",
    "generic",
    "pipe",
    "read_only",
    "write_only",
    "read_write",
}  # fine in Metal, keywords in clang's CL mode
BF = ("bfloat", "__bf16", "bfloat16_t")
_ok = {}


def tokens_lint(name, text, where):
    out, line = [], 1
    for t in cg.tokens(text):
        if t in BANNED and not cg._skip(t):
            out.append(f"{name}.{where}:{line}: error: `{t}`: {BANNED[t]}")
        if re.match(r"0[xX].*|[A-Za-z_]", t) is None and re.match(r"[\d.]+(e[-+]?\d+)?[lL]$", t) and "." in t:
            out.append(f"{name}.{where}:{line}: error: long double literal {t}")
        line += t.count("\n")
    return out


def _ty(n):
    return n.get("type", {}).get("qualType", "")


def _desugar(n):
    t = n.get("type", {})
    return t.get("desugaredQualType", t.get("qualType", ""))


def _is_bf(n):
    d = re.sub(r"\b(const|volatile|__private|__global|__local|__constant|__generic)\b", "", _desugar(n)).strip()
    return d in BF


def ast_lint(ast):
    out, cur = [], {"file": "?", "line": 0}

    def loc(n):
        l = n.get("loc") or {}
        b = (n.get("range") or {}).get("begin") or {}
        for d in (l.get("expansionLoc", l), b.get("expansionLoc", b)):
            if d.get("presumedFile"):
                cur["file"] = d["presumedFile"]
            if d.get("presumedLine") or d.get("line"):
                cur["line"] = d.get("presumedLine", d.get("line"))

    def walk(n, fn, explicit):
        if not isinstance(n, dict) or not n:
            return
        k = n.get("kind", "")
        if n.get("isImplicit") and k in (
            "CXXConstructorDecl",
            "CXXMethodDecl",
            "CXXDestructorDecl",
            "CXXConversionDecl",
        ):
            return
        loc(n)
        here = f"{cur['file']}:{cur['line']}"
        if k in ("VarDecl", "ParmVarDecl", "FieldDecl") and "__generic" in _ty(n) and not n.get("isImplicit"):
            out.append(
                f"{here}: error: pointer/reference `{n.get('name', '')}` ({_ty(n)}) needs an address space (device, threadgroup, constant or thread)"
            )
        if k in ("GotoStmt", "LabelStmt", "CXXNewExpr", "CXXDeleteExpr", "CXXThrowExpr", "CXXTryStmt", "GCCAsmStmt"):
            out.append(f"{here}: error: {k} is not allowed in MSL")
        if k == "LambdaExpr":
            out.append(f"{here}: warning: lambda expressions are not part of MSL before Metal 4")
        if (
            k == "ImplicitCastExpr"
            and n.get("castKind") in ("FloatingCast", "IntegralToFloating")
            and _is_bf(n)
            and not n.get("isPartOfExplicitCast")
            and not explicit
        ):
            src = (n.get("inner") or [{}])[0]
            if not _is_bf(src):
                sev = "error" if n["castKind"] == "FloatingCast" else "warning"
                out.append(
                    f"{here}: {sev}: implicit conversion from {_ty(src)} to bfloat (write static_cast<bfloat16_t>(...))"
                )
        if k in ("CallExpr",) and fn:
            r = json.dumps((n.get("inner") or [{}])[0])
            if f'"id": "{fn}"' in r and '"FunctionDecl"' in r:
                out.append(f"{here}: warning: recursive call")
        if k == "CallExpr":
            inner = n.get("inner") or [{}]
            callee = json.dumps(inner[0])
            m = re.search(r'"name": "((?:simd|quad)_\w+)"', callee)
            for a in inner[1:2] if m else []:
                if a.get("kind") == "ImplicitCastExpr" and a.get("castKind") == "IntegralToFloating" and _is_bf(a):
                    out.append(
                        f"{here}: error: {m.group(1)} has no overload for {_ty((a.get('inner') or [{}])[0])}; it would go through MLX's bfloat overload"
                    )
        f2 = n.get("id") if k in ("FunctionDecl", "CXXMethodDecl") else fn
        ex = k in ("CXXStaticCastExpr", "CStyleCastExpr", "CXXFunctionalCastExpr")
        for c in n.get("inner", []):
            walk(c, f2, ex)

    main = False
    for d in ast.get("inner", []):
        l = d.get("loc", {})
        l = l.get("expansionLoc", l)
        if not main and l.get("file") and "includedFrom" not in l:
            main = True
        if main and "includedFrom" not in l:
            walk(d, None, False)
        elif "includedFrom" in l:
            main = False
    seen, uniq = set(), []
    for x in out:
        if x not in seen:
            seen.add(x)
            uniq.append(x)
    return uniq


FATAL_WARN = ("-Wuninitialized", "-Wsometimes-uninitialized", "-Wconditional-uninitialized", "-Wreturn-type")


def run(gargs):
    """-> (errors, warnings), every entry a 'file:line:col: ...' string"""
    name, header, source = gargs[:3]
    errors = tokens_lint(name, header, "header") + tokens_lint(name, source, "metal")
    rc, err, out = build.syntax_check(cg.check_source(*gargs))
    warnings = []
    for l in err.splitlines():
        if ": error:" in l or ": fatal error:" in l:
            errors.append(l)
        elif ": warning:" in l and l.startswith(name + "."):
            (errors if any(f in l for f in FATAL_WARN) else warnings).append(l)
    if rc == 0:
        for l in ast_lint(json.loads(out)):
            (errors if ": error:" in l else warnings).append(l)
    elif not errors:
        errors.append(err)
    return errors, warnings


def check(kernel, gargs):
    key = hashlib.sha256(
        repr(
            (gargs[0], gargs[1], gargs[2], [(a.name, a.dtype, a.ndim, a.size < 8) for a in gargs[3]], gargs[4:])
        ).encode()
        + build._shim_key().encode()
    ).hexdigest()
    f = build.CACHE / f"lint_{key[:24]}.json"
    if key in _ok:
        r = _ok[key]
    elif f.exists():
        r = _ok[key] = json.loads(f.read_text())
    else:
        r = _ok[key] = run(gargs)
        build.CACHE.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(r))
    kernel.warnings = r[1]
    if r[0]:
        raise build.CompileError("\n".join(r[0]))
    return r[1]
