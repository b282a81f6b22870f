"""Functions stay short and take few parameters, where the signature is this project's own."""

import ast
from collections.abc import Iterator

from test_imports import FILES

MOST_LINES, MOST_PARAMETERS = 60, 7
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Function → why its signature is not ours to shorten.
SIGNATURES = {
    "llava.model.builder.load_pretrained_model": "LLaVA's own, with our keywords after its",
    "llava.model.language_model.decoder.LlavaDecoder.forward": "transformers' decoder",
    "llava.model.language_model.decoder.LlavaCausalLM.forward": "transformers' causal model",
    "llava.serve.session.Session.__init__": "what load_pretrained_model returns comes first",
    "libra.lmms.lmms_libra.LibraModel.__init__": "the model arguments of lmms-eval's command line",
    "libra.engine.score._with_probe.hybrid": "transformers' attention interface",
    "mini.answering.Answerer.forward": "the columns of a batch, which transformers' trainer passes by name",
    "mini.shared_prefix.shared_prefix_attention": "transformers' attention interface",
}
# Function → why it is longer.
LONG = {
    "llava.model.language_model.decoder.LlavaCausalLM.forward": "the modified forward, to be read at once",
    "llava.model.llava_arch.LlavaMetaForCausalLM.splice": "mostly its contract",
    "llava.model.llava_arch.LlavaMetaForCausalLM.generate": "mostly its contract",
}


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, Function]]:
    """Every function below a syntax tree with its dotted name."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        inner = f"{name}.{child.name}" if named else name
        if named and not isinstance(child, ast.ClassDef):
            yield inner, child
        yield from functions(child, inner)


def parameters(function: Function) -> int:
    """Without self and cls."""
    a = function.args
    each = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return len(each) - (bool(each) and each[0].arg in ("self", "cls"))


def is_kernel(function: Function) -> bool:
    """Whether Triton compiles it: a launch passes pointers, strides and sizes one by one."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


ALL = [
    pair
    for name, path in FILES.items()
    for pair in functions(ast.parse(path.read_bytes()), name)
    if not is_kernel(pair[1])
]


def test_no_function_is_long():
    lines = {name: function.end_lineno - function.lineno + 1 for name, function in ALL}
    assert {name for name, n in lines.items() if n > MOST_LINES} == LONG.keys()


def test_no_function_takes_many_parameters():
    wide = {name for name, function in ALL if parameters(function) > MOST_PARAMETERS}
    assert wide == SIGNATURES.keys()
