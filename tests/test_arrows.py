"""Imports point one way: from the command down to the network and the nuclei, never back."""

import ast

ALLOWED = {  # module -> the modules that it may import
    "dualunet": "", "postprocess": "", "metrics": "", "images": "",
    "labels": "images",
    "outputs": "postprocess",
    "data": "images labels outputs",
    "crops": "data images postprocess",
    "pictures": "images postprocess",
    "slides": "outputs pictures postprocess",
    "convert": "dualunet",
    "runs": "images pictures",
    "infer": "convert dualunet images outputs pictures postprocess runs slides",
    "evaluate": "convert crops data dualunet images infer labels metrics outputs runs",
    "recipes": "data dualunet images runs",
    "train": "convert crops data dualunet evaluate outputs recipes runs",
}


def siblings(path):
    """The modules of this project that a file imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & ALLOWED.keys()


def test_every_module_has_its_arrows(root):
    assert {path.stem for path in root.glob("*.py")} == ALLOWED.keys()
    for name, allowed in ALLOWED.items():
        assert siblings(root / f"{name}.py") <= set(allowed.split()), name


def test_the_arrows_have_no_cycle():
    done = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, allowed in ALLOWED.items()
                 if name not in done and set(allowed.split()) <= done}
        assert ready, sorted(ALLOWED.keys() - done)
        done |= ready
