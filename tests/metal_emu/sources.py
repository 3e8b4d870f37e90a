"""The two texts made from an instantiation: one that clang type-checks, one that it compiles for the CPU."""

from __future__ import annotations

from .instance import Instance
from .rewrite import threadgroup_to_static, vector_constructors
from .signature import (
    attributes,
    function_text,
    kernel_name,
    output_types,
    parameters,
    template_list,
    template_text,
)

ENTRY = "emu_entry"  # the function of a compiled kernel that the runtime calls for each thread


def _product(name: str) -> str:
    return " * ".join(f"c->{name}.{axis}" for axis in "xyz")


# Attributes which the runtime does not keep, from those it keeps in EmuContext.
_DERIVED = {
    "grid_size": "uint3(c->threads_per_grid.x, c->threads_per_grid.y, c->threads_per_grid.z)",
    "grid_origin": "uint3(0)",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "(c->thread_index_in_threadgroup & 3)",
    "quadgroup_index_in_threadgroup": "(c->thread_index_in_threadgroup >> 2)",
    "quadgroups_per_threadgroup": f"(({_product('threads_per_threadgroup')} + 3) / 4)",
    "dispatch_quadgroups_per_threadgroup": f"(({_product('dispatch_threads_per_threadgroup')} + 3) / 4)",
}


def _attribute(name: str, kind: str) -> str:
    if name in _DERIVED:
        return _DERIVED[name]
    return f"uint3(c->{name}.x, c->{name}.y, c->{name}.z)" if kind == "uint3" else f"c->{name}"


def run_source(instance: Instance) -> str:
    """C++ of the kernel and of an entry that unpacks its arguments. Lines are those of body and header."""
    header, count = threadgroup_to_static(vector_constructors(instance.header))
    body, _ = threadgroup_to_static(vector_constructors(instance.source), count)
    text = f'#line 1 "{instance.name}.header"\n{header}\n' if header else ""
    text += function_text(instance, f'#line 1 "{instance.name}.metal"\n{body}')
    arguments = []
    for kind, _, _, _ in parameters(instance):
        slot = f"b[{len(arguments)}]"
        arguments.append(f"*({kind[:-1]}*){slot}" if kind.endswith("&") else f"({kind}){slot}")
    for kind in output_types(instance):
        arguments.append(f"({kind})b[{len(arguments)}]")
    arguments += [_attribute(name, kind) for name, kind in attributes(instance.source)]
    call = f"{kernel_name(instance)}{template_list(instance)}({', '.join(arguments)});"
    unchecked = '__attribute__((no_sanitize("thread", "undefined")))'
    entry = f'extern "C" {unchecked} void {ENTRY}(void** b, const EmuContext* c) {{ {call} }}'
    return f'{text}\n#line 1 "entry"\n{entry}\n'


def check_source(instances: list[Instance]) -> str:
    """C++ for OpenCL of several instantiations that share a header.

    Each becomes one ``__kernel``, where threadgroup variables are legal exactly where Metal allows them; what would
    be its parameters are variables. The body of number k counts its lines as those of ``name@k.metal``.
    """
    first = instances[0]
    text = f'#line 1 "{first.name}.header"\n{vector_constructors(first.header)}\n' if first.header else ""
    for number, instance in enumerate(instances):
        text += f'#line 1 "{instance.name}@{number}.arguments"\n__kernel void emu_check_{number}() {{\n'
        for name, value in instance.template:
            if isinstance(value, (bool, int)):
                text += f"constexpr {type(value).__name__} {name} = {template_text(value)};\n"
            else:
                text += f"typedef {template_text(value)} {name};\n"
        for kind, name, _, _ in parameters(instance):
            value = f"*({kind[:-1]}*)8" if kind.endswith("&") else f"({kind})8"
            text += f"{kind} {name} = {value};\n"
        for kind, name in zip(output_types(instance), instance.output_names, strict=True):
            text += f"{kind} {name} = ({kind})8;\n"
        for name, kind in attributes(instance.source):
            text += f"{kind} {name} = ({kind})1;\n"
        text += f'#line 1 "{instance.name}@{number}.metal"\n{vector_constructors(instance.source)}\n}}\n'
    return text
