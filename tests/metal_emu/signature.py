"""The Metal source MLX generates around a kernel body: a port of its ``write_signature``, checked against MLX's own.

Source: ``mlx/backend/common/metal_kernel.cpp``, MLX 0.32.
"""

from __future__ import annotations

from .instance import Instance

METAL_TYPES = {
    "float32": "float",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "complex64": "complex64_t",
    "bool": "bool",
} | {f"{kind}{bits}": f"{kind}{bits}_t" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
# The names MLX looks for in the body, in its order, with their types.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}


def attributes(source: str) -> list[tuple[str, str]]:
    """(name, type) of every attribute that MLX would add for this body: a plain search, comments included."""
    return [(name, kind) for name, kind in ATTRIBUTES.items() if name in source]


def parameters(instance: Instance) -> list[tuple[str, str, str, int]]:
    """(type, name, what, input index) of every input-side parameter; what is data, shape, strides or ndim."""
    out = []
    for index, arg in enumerate(instance.inputs):
        space = "constant" if arg.is_constant else "device"
        out.append((f"const {space} {METAL_TYPES[arg.dtype]}{'&' if arg.is_scalar else '*'}", arg.name, "data", index))
        for what, kind in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
            if not arg.is_scalar and f"{arg.name}_{what}" in instance.source:
                out.append((f"const constant {kind}", f"{arg.name}_{what}", what, index))
    return out


def output_types(instance: Instance) -> list[str]:
    """The pointer type of every output."""
    names = [METAL_TYPES[dtype] for dtype in instance.output_dtypes]
    return [f"device atomic<{name}>*" if instance.atomic_outputs else f"device {name}*" for name in names]


def template_text(value: bool | int | str) -> str:
    """A template argument as MLX writes it: booleans as 1 and 0."""
    return str(int(value)) if isinstance(value, (bool, int)) else METAL_TYPES[value]


def template_list(instance: Instance) -> str:
    """``<float16_t, 4>``, or nothing without template arguments."""
    return f"<{', '.join(template_text(v) for _, v in instance.template)}>" if instance.template else ""


def kernel_name(instance: Instance) -> str:
    """The name under which MLX caches this instantiation."""
    name = "custom_kernel_" + instance.name
    if instance.template:
        name += "_" + template_list(instance).replace("<", "_").replace(">", "_").replace(", ", "_")[:-1]
    for arg in instance.inputs:
        suffix = "s" if arg.is_scalar else "c" if arg.is_constant else ""
        name += f"_{METAL_TYPES[arg.dtype]}{suffix}"
    return name + "".join("_" + METAL_TYPES[dtype] for dtype in instance.output_dtypes)


def function_text(instance: Instance, body: str) -> str:
    """The kernel function around a body, with its template line and its parameters."""
    name = kernel_name(instance)
    kinds = [
        ("bool" if isinstance(v, bool) else "int" if isinstance(v, int) else "typename") for _, v in instance.template
    ]
    text = ""
    if instance.template:
        text += f"template <{', '.join(f'{k} {n}' for k, (n, _) in zip(kinds, instance.template, strict=True))}>\n"
    text += f"[[kernel]] void {name}(\n"
    found = attributes(instance.source)
    inputs = parameters(instance)
    for index, (kind, arg, _, _) in enumerate(inputs):
        text += f"  {kind} {arg} [[buffer({index})]],\n"
    count = len(instance.inputs) + len(instance.output_names)
    for index, (kind, arg) in enumerate(zip(output_types(instance), instance.output_names, strict=True), len(inputs)):
        # MLX compares the buffer's number, which also counts shapes and strides, with the number of arrays.
        end = ",\n" if index < count - 1 or found else ") {\n"
        text += f"  {kind} {arg} [[buffer({index})]]{end}"
    for index, (arg, kind) in enumerate(found):
        text += f"  {kind} {arg} [[{arg}]]" + (",\n" if index < len(found) - 1 else ") {\n")
    return f"{text}{body}\n}}\n"


def metal_source(instance: Instance) -> str:
    """The text that MLX hands to the Metal compiler for this instantiation, without MLX's own prelude."""
    text = instance.header + function_text(instance, instance.source)
    if instance.template:
        name = kernel_name(instance)
        special = name + template_list(instance)
        text += f'\ntemplate [[host_name("{name}")]] [[kernel]] decltype({special}) {special};\n'
    return text
