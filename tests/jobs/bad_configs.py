"""Wrong configurations, each with what the answer has to name: key, value and remedy."""

from __future__ import annotations

MODULE = """
import torch
from torch import nn
from shardmap.jobs import Dataset, Findings

class Net(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.first = nn.Linear(2, width)
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

class Mute:
    pass

def load(rows: int = 5):
    return Dataset({"x": torch.arange(2.0 * rows).view(rows, 2), "y": torch.arange(rows) % 4})

def unequal():
    return Dataset({"x": torch.zeros(3, 2), "y": torch.zeros(4)})

def parameters(dataset):
    return torch.ones(2)

def one(x):
    return x.sin()

def two(x, y):
    return x.sin() * y

def squared(params, x):
    return (params * x).square().sum()

def loss(output, label):
    return nn.functional.cross_entropy(output, label)

NUMBER = 3
"""
GOOD = "data: users_bad.load\nfunction: users_bad.one\ncolumns: [x]\noutput: runs/mine\n"
GRADIENT = (
    "task: per_sample_grad\ndata: users_bad.load\nmodel: users_bad.Net\nloss: users_bad.loss\n"
    "output: runs/mine\n"
)
NET = "data: users_bad.load\nmodel: users_bad.Net\ncolumns: [x]\noutput: runs/mine\n"

# name: (the configuration, words of the command line, what the line must name: key, value, remedy)
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    # the file
    "not there": ("", ["run", "nowhere.yaml"], ["nowhere.yaml", "no such file", "give the path"]),
    "no syntax": (
        "data: [1, 2\nfunction: }\n", [],
        ["run.yaml, line 2", "not YAML", "mend the syntax"],
    ),
    "a key twice": (
        GOOD + "data: users_bad.unequal\n", [],
        ["run.yaml, line 5", "data is given twice", "leave one"],
    ),
    "an argument twice": (
        GOOD.replace(
            "data: users_bad.load",
            "data: {path: users_bad.load, init_args: {rows: 3, rows: 4}}",
        ),
        [],
        ["line 1", "data.init_args.rows is given twice", "leave one"],
    ),
    "a tab": ("data:\n\tpath: x\n", [], ["run.yaml, line 2", "not YAML", "mend the syntax"]),
    "an object of python's": (
        "data: !!python/object/apply:os.mkdir [pwned]\n", [],
        ["not YAML", "python/object", "mend the syntax"],
    ),
    "not UTF-8": ("\udcff\udcfe", [], ["run.yaml", "not UTF-8 text", "give the path"]),
    "a list": ("- a\n- b\n", [], ["run.yaml", "['a', 'b']", "start from"]),
    "nothing": ("", [], ["run.yaml", "None", "start from"]),
    # unknown keys at each level
    "unknown key": (
        GOOD + "chunksize: 3\n", [],
        ["chunksize", "value 3", "did you mean chunk_size?"],
    ),
    "unknown key, misspelt task": (
        GOOD + "taks: vmap\n", [],
        ["taks", "'vmap'", "did you mean task?"],
    ),
    "the old spelling of arguments": (
        GOOD.replace("data: users_bad.load", "data: {path: users_bad.load, args: {rows: 3}}"), [],
        ["data.args", "{'rows': 3}", "did you mean data.init_args?"],
    ),
    "unknown key of a source": (
        "source: {path: x.npy, colums: [x]}\n", [],
        ["source.colums", "['x']", "did you mean source.columns?"],
    ),
    "unknown key of a loss": (
        GRADIENT, ["--loss.pth", "x"],
        ["loss.pth", "'x'", "did you mean loss.path?"],
    ),
    "unknown argument of a function": (
        GOOD, ["--data.init_args.row", "3"],
        ["data.init_args.row", "'3'", "did you mean data.init_args.rows?"],
    ),
    "unknown argument of a class": (
        NET, ["--model.init_args.widht", "3"],
        ["model.init_args.widht", "did you mean model.init_args.width?"],
    ),
    "unknown argument of a reduction": (
        GOOD, ["--reduce", "{name: mean, norm: 3}"],
        ["reduce.norm", "value 3", "it takes none"],
    ),
    # wrong types
    "text for a number": (
        GOOD, ["--chunk_size", "many"],
        ["chunk_size", "'many'", "give a whole number"],
    ),
    "a fraction of a chunk": (
        GOOD + "chunk_size: 2.5\n", [],
        ["chunk_size", "2.5", "give a whole number"],
    ),
    "a negative chunk": (GOOD + "chunk_size: -1\n", [], ["chunk_size", "-1", "at least 1"]),
    "a list for a seed": (GOOD + "seed: [1, 2]\n", [], ["seed", "[1, 2]", "give a whole number"]),
    "text for yes or no": (
        GRADIENT + "flat: perhaps\n", [],
        ["flat", "'perhaps'", "give true or false"],
    ),
    "numbers for names": (GOOD + "memory_budget: [1]\n", [], ["memory_budget", "[1]", "give text"]),
    "a number for a section": (
        GOOD.replace("users_bad.load", "3"), [],
        ["data", "3", "is not a section"],
    ),
    "arguments in a list": (
        GOOD, ["--data.init_args", "[1]"],
        ["data.init_args", "'[1]'", "give names and values"],
    ),
    "an argument of the wrong type": (
        GOOD, ["--data.init_args.rows", "lots"],
        ["data.init_args.rows", "'lots'", "give a whole number"],
    ),
    "a budget that is none": (
        GOOD + "memory_budget: much\n", [],
        ["memory_budget", "'much'", "write for example 6GiB"],
    ),
    # what is named
    "no samples": (
        "function: users_bad.one\n", [],
        ["data: missing", "source", "data: package.module.name"],
    ),
    "samples twice": (GOOD + "source: x.npy\n", [], ["source", "'x.npy'", "leave the other out"]),
    "nothing to map": (
        "data: users_bad.load\n", [],
        ["function: missing", "model", "function: package.module.name"],
    ),
    "no import path": (
        GOOD, ["--function", "one"],
        ["function.path", "'one'", "write package.module.name"],
    ),
    "no such module": (
        GOOD, ["--function", "no_such.one"],
        ["function.path", "'no_such.one'", "check the spelling"],
    ),
    "no such function": (
        GOOD, ["--function", "users_bad.on"],
        ["function.path", "'users_bad.on'", "did you mean users_bad.one?"],
    ),
    "no such class": (
        NET, ["--model", "users_bad.Nett"],
        ["model.path", "'users_bad.Nett'", "did you mean users_bad.Net?"],
    ),
    "not to be called": (
        GOOD, ["--function", "users_bad.NUMBER"],
        ["function.path", "'users_bad.NUMBER' is a int", "name a function"],
    ),
    "what it makes is not to be called": (
        GOOD, ["--function", "users_bad.Mute"],
        ["function.path", "'users_bad.Mute'", "give it a __call__"],
    ),
    "a module that breaks": (
        GOOD, ["--data", "users_broken.load"],
        ["data.path", "ZeroDivisionError", "mend users_broken"],
    ),
    "data that is none": (
        GOOD, ["--data", "os.getcwd"],
        ["data.path", "'os.getcwd' returned a str", "return a shardmap.jobs.Dataset"],
    ),
    "columns of other lengths": (
        GOOD, ["--data", "users_bad.unequal"],
        ["data", "'x': 3, 'y': 4", "one row per sample"],
    ),
    "a column that is not there": (
        GOOD, ["--columns", "[x, z]"],
        ["columns", "'z'", "known: x, y"],
    ),
    "too many columns": (GOOD, ["--columns", "[x, y]"], ["columns", "x, y", "name other columns"]),
    "too few columns": (
        GOOD, ["--function", "users_bad.two"],
        ["columns", "'y'", "name other columns"],
    ),
    "a report without a parameter": (
        GOOD + "report: users_bad.Mute\n", [],
        ["report.path", "'users_bad.Mute' takes no argument", "add a parameter"],
    ),
    # samples in files
    "a source that is not there": (
        "source: nowhere.npy\nfunction: users_bad.one\n", [],
        ["source", "nowhere.npy is not there", "check the path"],
    ),
    "a source of an unknown kind": (
        "source: users_bad.py\nfunction: users_bad.one\n", [],
        ["source", "users_bad.py", "neither a `.npy`"],
    ),
    "a source that is cut short": (
        "source: short.npy\nfunction: users_bad.one\n", [],
        ["source", "short.npy", "copy it again"],
    ),
    "a source that is a pickle": (
        "source: objects.npy\nfunction: users_bad.one\n", [],
        ["source", "objects.npy", "object"],
    ),
    "an empty path": (
        "source: ''\nfunction: users_bad.one\n", [],
        ["source.path", "''", "give a file"],
    ),
    "a source without path": (
        "source: {columns: [x]}\nfunction: users_bad.one\n", [],
        ["source.path", "missing", "give a file"],
    ),
    "a column that the file has not": (
        "source: {path: good.safetensors, columns: [first.wieght]}\nfunction: users_bad.one\n", [],
        ["source", "'first.wieght'", "there are 'first.bias'"],
    ),
    # weights
    "weights that are not there": (
        NET + "weights: nowhere.safetensors\n", [],
        ["weights", "'nowhere.safetensors' is not there", "give"],
    ),
    "weights of an unknown kind": (
        NET + "weights: x.npy\n", [],
        ["weights", "'x.npy'", "give a .safetensors"],
    ),
    "weights of a folder": (
        NET + "weights: folder.pt\n", [],
        ["weights", "'folder.pt' is a folder", "give"],
    ),
    "weights with code": (
        NET + "weights: evil.pt\n", [],
        ["weights", "'evil.pt'", "save module.state_dict()"],
    ),
    "weights with code in the old format": (
        NET + "weights: evil_old.pth\n", [],
        ["weights", "'evil_old.pth'", "save module.state_dict()"],
    ),
    "a pickle called safetensors": (
        NET + "weights: evil.safetensors\n", [],
        ["weights", "'evil.safetensors'", "save the module again"],
    ),
    "weights that are cut short": (
        NET + "weights: short.pt\n", [],
        ["weights", "'short.pt' cannot be read", "save module.state_dict()"],
    ),
    "a whole checkpoint": (
        NET + "weights: checkpoint.pt\n", [],
        ["weights", "'model', a OrderedDict", "save module.state_dict()"],
    ),
    "weights that are a list": (
        NET + "weights: list.pt\n", [],
        ["weights", "a list", "save module.state_dict()"],
    ),
    "weights that lack some": (
        NET + "weights: lacking.safetensors\n", [],
        ["weights", "lacks 'last.bias'", "save the weights"],
    ),
    "weights that are too many": (
        NET + "weights: more.pt\n", [],
        ["weights", "has 'extra'", "name the module"],
    ),
    "weights of another shape": (
        NET + "weights: good.safetensors\n", ["--model.init_args.width", "5"],
        ["weights", "'first.bias' of shape [3], the module [5]", "give the init_args"],
    ),
    "weights with more digits": (
        NET + "weights: double.pt\n", [],
        ["weights", "torch.float64", "convert the file"],
    ),
    "weights for a function": (
        GOOD + "weights: good.safetensors\n", [],
        ["weights", "'good.safetensors'", "name a class"],
    ),
    "weights for a tensor": (
        "data: users_bad.load\nmodel: users_bad.parameters\nfunction: users_bad.squared\n"
        "columns: [x]\nweights: good.safetensors\n",
        [],
        ["weights", "a Tensor", "name a module"],
    ),
    # tasks
    "no such task": (GOOD + "task: jacobin\n", [], ["task", "'jacobin'", "jacobian"]),
    "a loss without its task": (
        NET + "loss: users_bad.loss\n", [],
        ["loss", "task: vmap", "per_sample_grad"],
    ),
    "parameters without their task": (
        NET + "params: '*'\n", [],
        ["params", "task: vmap", "leave params out"],
    ),
    "flat without its task": (
        NET + "flat: true\n", [],
        ["flat: true", "task: vmap", "leave flat out"],
    ),
    "a method without its task": (
        GOOD + "method: forward\ntask: hessian\n", [],
        ["method: forward", "task: hessian", "task: jacobian"],
    ),
    "argnums without their task": (
        GOOD + "argnums: 1\n", [],
        ["argnums: 1", "task: vmap", "leave argnums out"],
    ),
    "no such argument": (
        GOOD + "task: jacobian\nargnums: 1\n", [],
        ["argnums: 1", "columns are x", "give 0 to 0"],
    ),
    "no argument": (
        GOOD + "task: hessian\nargnums: []\n", [],
        ["argnums: []", "empty", "give the number"],
    ),
    "no parameter": (GRADIENT + "params: []\n", [], ["params: []", "empty", "give names"]),
    "gradients without a loss": (
        GRADIENT, ["--loss", "null"],
        ["function: missing", "per_sample_grad", "give loss"],
    ),
    "gradients without parameters": (
        GOOD + "task: per_sample_grad\n", [],
        ["model: missing", "per_sample_grad", "give loss"],
    ),
    "a function and a loss": (
        GRADIENT + "function: users_bad.one\n", [],
        ["function: users_bad.one", "loss", "leave function or loss out"],
    ),
    "a loss of a function": (
        GOOD + "task: per_sample_grad\nloss: users_bad.loss\n", [],
        ["loss", "'users_bad.loss'", "users_bad.one is a function", "name a class"],
    ),
    "a loss of no module": (
        GRADIENT, ["--model", "users_bad.parameters"],
        ["cannot be called", "users_bad.parameters", "name a function"],
    ),
    "a loss that is not there": (
        GRADIENT, ["--loss", "users_bad.los"],
        ["loss.path", "'users_bad.los'", "did you mean users_bad.loss?"],
    ),
    "a loss that cannot be called": (
        GRADIENT, ["--loss", "users_bad.NUMBER"],
        ["loss.path", "is a int", "name a function or class"],
    ),
    "a loss of too little": (
        GRADIENT, ["--columns", "[x]"],
        ["columns", "loss", "'label'", "name other columns or another loss"],
    ),
    "gradients by a module": (
        "task: per_sample_grad\ndata: users_bad.load\nmodel: users_bad.Net\n"
        "function: users_bad.squared\ncolumns: [x]\n",
        [],
        ["function: squared", "that is a module", "give loss"],
    ),
    "a product by two columns": (
        GOOD + "task: hvp\nargnums: [0, 1]\n", [],
        ["argnums: [0, 1]", "task: hvp", "give the number"],
    ),
    "a product by its vectors": (
        GOOD + "task: hvp\nargnums: 1\n", ["--columns", "[x, y]"],
        ["argnums: 1", "the function's columns are x", "give 0 to 0"],
    ),
    "a product without a vector": (
        GOOD + "task: hvp\n", [],
        ["columns: x is one", "task: hvp", "name it"],
    ),
    # reductions
    "no such reduction": (
        GOOD + "reduce: median\n", [],
        ["reduce", "'median'", "did you mean mean?"],
    ),
    "a reduction without a name": (
        GOOD + "reduce: {a: {nam: mean}}\n", [],
        ["reduce.a.name", "missing", "give one of"],
    ),
    "a reduction that is a number": (
        GOOD + "reduce: 3\n", [],
        ["reduce", "3 is no reduction", "known: sum"],
    ),
    "the same reduction twice": (
        GOOD + "reduce: [mean, mean]\n", [],
        ["reduce", "'mean' is listed twice", "a name of its own"],
    ),
    "no reduction": (GOOD + "reduce: {}\n", [], ["reduce", "names no reduction", "give one"]),
    "a reduction in half a list": (
        GOOD, ["--reduce", "[mean"],
        ["reduce", "'[mean'", "write for example"],
    ),
    # places and devices
    "an absent device": (GOOD + "devices: cuda:7\n", [], ["cuda:7", "devices"]),
    "an unknown device": (GOOD + "devices: abacus\n", [], ["abacus", "devices"]),
    "no device": (GOOD + "devices: []\n", [], ["devices: []", "give auto"]),
    "workers of nothing": (GOOD + "workers: 3\n", [], ["workers: 3", "give devices: ray"]),
    "a folder below a file": (
        GOOD, ["--output", "users_bad.py/run"],
        ["output", "'users_bad.py/run'", "give a folder"],
    ),
    "a folder where none can be made": (
        GOOD, ["--output", "/proc/shardmap/run"],
        ["output", "'/proc/shardmap/run'", "give a folder"],
    ),
    "no folder": (GOOD, ["--output", ""], ["output", "''", "give the path"]),
    "a store of another run": (
        GOOD, ["--store", "store", "--resume", "true", "--data.init_args.rows", "4"],
        ["data.init_args.rows: 5 is stored, 4 is given", "name another place"],
    ),
    "a store that is there": (
        GOOD, ["--store", "store"],
        ["store", "'store'", "give resume: true"],
    ),
    "a store and a reduction": (
        GOOD, ["--store", "s", "--reduce", "mean"],
        ["reduce: mean", "store: s", "leave one of them out"],
    ),
    "a kind of store without one": (
        GOOD, ["--store_kind", "memmap"],
        ["store_kind: memmap", "give store"],
    ),
    # what may be imported
    "not allowed": (
        GOOD, ["--allow", "torch"],
        ["data.path", "'users_bad.load'", "give --allow users_bad"],
    ),
    "not quite allowed": (
        GOOD, ["--allow", "users"],
        ["data.path", "'users_bad.load'", "give --allow users_bad"],
    ),
    "one of several not allowed": (
        GOOD + "report: os.mkdir\n", ["--allow", "users_bad", "--allow", "shardmap.jobs"],
        ["report.path", "'os.mkdir'", "below users_bad, shardmap.jobs"],
    ),
    "refused before it is imported": (
        GOOD, ["--data", "users_broken.load", "--allow", "users_bad"],
        ["data.path", "is not allowed"],
    ),
}  # fmt: skip
