"""Every CPU capability against the references, each in a process of its own, since the capability is chosen once.

One process runs the probes of all operators, and all processes run at the same time: importing torch is most of each.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_knn import clusters

CAPABILITIES = ["generic", "avx2", "avx512", "avx512_vnni", "amx"]

PROBES = {
    "kmeans": """
for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    for n, d, k in ((500, 70, 90), (300, 3, 10), (200, 200, 150)):
        x = torch.randn(n, d, dtype=dtype)
        got = fastclust.kmeans(x, k, init=x[:k], max_iter=4)
        want = reference.kmeans_lloyd(x[None].double(), x[None, None, :k].double(), max_iter=4)
        assert abs(float(got.inertia) / float(want[2]) - 1) < bound, (dtype, n, d, k)
assert fastclust.kmeans(torch.randn(200, 9), 20, n_init=3, seed=0).labels.max() < 20
""",
    "knn": """
x = torch.load(sys.argv[1])
for metric in ("cosine", "inner_product", "euclidean"):
    for queries in (None, x[:150] * 1.25):
        found = fastclust.knn(x, 25, queries=queries, metric=metric).indices
        wanted = reference.knn(x, queries, 25, metric, True)[1]
        assert torch.equal(found, wanted), (metric, queries is None)
        queries = None if queries is None else queries.float()
        found = fastclust.knn(x.float(), 25, queries=queries, metric=metric).indices
        assert (found == wanted).float().mean() > 0.999, (metric, queries is None)
""",
    "pairwise_kl and soft_assign": """
for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    for k in (3, 16, 37):
        log_p = torch.randn(150, k, dtype=dtype).log_softmax(1).requires_grad_()
        labels = torch.arange(150) % 5 - 1
        twin = log_p.detach().double().requires_grad_()
        (grad,) = torch.autograd.grad(ops.pairwise_kl(log_p, labels, 1.0, False), log_p)
        (expected,) = torch.autograd.grad(reference.pairwise_kl(twin, labels, 1.0, False), twin)
        assert (grad - expected).norm() <= limit * expected.norm(), (dtype, k)
        x, centroids = torch.randn(70, k, dtype=dtype), torch.randn(9, k, dtype=dtype)
        error = fastclust.soft_assign(x, centroids) - reference.soft_assign(x.double(), centroids.double())
        assert error.abs().max() <= 10 * limit, (dtype, k)
""",
    "diffuse": """
w = torch.rand(300, 300, dtype=torch.float64) * (torch.rand(300, 300) < 0.05)
for dtype in (torch.float32, torch.float64):
    graph, y = (w + w.T).to(dtype).to_sparse_csr(), torch.randn(300, 53, dtype=dtype)
    for columns in (1, 4, 7, 53):
        f = fastclust.diffuse(graph, y[:, :columns], max_iter=50).f
        twin = reference.diffuse(graph.crow_indices(), graph.col_indices(), graph.values().double(),
                                 y[:, :columns].double(), 0.99, 1e-6, 50)[0]
        error = ((f - twin).norm() / twin.norm()).item()
        assert error < (1e-5 if dtype == torch.float32 else 1e-12), (dtype, columns, error)
""",
}
RUN = """
import json, sys, traceback, torch, fastclust
from fastclust import ops, reference
errors = {}
for name, probe in json.loads(sys.argv[2]).items():
    torch.manual_seed(0)
    try:
        exec(probe)
        errors[name] = ""
    except Exception:
        errors[name] = traceback.format_exc()
print(json.dumps([fastclust.ops.C.cpu_capability(), errors]))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Each capability's exit code, and what it printed."""
    torch.save(clusters(1600, 70, dtype=torch.float64), path := tmp_path_factory.mktemp("knn") / "x.pt")
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(path), json.dumps(PROBES)]
    started = {
        capability: subprocess.Popen(
            command,
            env=os.environ | {"FASTCLUST_CPU_CAPABILITY": capability},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in CAPABILITIES
    }
    ended = {}
    for capability, process in started.items():
        out, errors = process.communicate()
        ended[capability] = process.returncode, out, errors
    return ended


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_agrees_with_the_references(processes, capability, probe):
    code, out, errors = processes[capability]
    if "this CPU has no" in errors:
        pytest.skip(f"this CPU has no {capability}")
    assert code == 0, errors
    chosen, found = json.loads(out)
    assert chosen == capability
    assert not found[probe], found[probe]
