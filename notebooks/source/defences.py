# %% [markdown]
# # What would stop it?
#
# Clients that clip, add noise, prune or quantise their gradients, or smooth their labels: how much still leaks? The
# observer is told nothing of the defence. `softinv audit` makes a whole report of this.

# %%
# Parameters. FAST: the smallest run, for tests.
import os

FAST = os.environ.get("SOFTINV_FAST") == "1"
DEFENCES = ("pruning",) if FAST else ("gaussian_noise", "pruning", "quantisation", "smoothing")
CLIENTS = 4 if FAST else 50
IMAGES = 1 if FAST else 3
SEED = 0

# %% [markdown]
# ## A system
#
# Softmax regression on small photographs in the fast run, LeNet otherwise.

# %%
from functools import partial

import numpy as np

from softinv_jax.audit import AuditSettings, System, audit, default_sweeps, make_system
from softinv_jax.client import load_photographs
from softinv_jax.images.layer_chain import Dense, Flatten, apply_chain

settings = AuditSettings(samples=CLIENTS, images=IMAGES, sweeps=default_sweeps(DEFENCES), seed=SEED)
if FAST:
    data = load_photographs(per_class=4, image_size=4)
    kernel = np.random.default_rng(SEED).uniform(-0.3, 0.3, (48, data.number_of_classes)).astype(np.float32)
    chain = (Flatten(), Dense("head"))
    system = System("softmax regression", partial(apply_chain, chain), {"head": {"kernel": kernel}}, chain, data)
else:
    system = make_system(settings)

# %% [markdown]
# ## The audit

# %%
result = audit(settings, system, progress=lambda done, total, stage: print(f"{done}/{total} {stage}"))
print()
for sentence in result.findings:
    print("*", sentence)

# %%
from IPython.display import display

from softinv_jax.report.audit_figures import audit_figures

for name, figure in audit_figures(result).items():
    if name.startswith("leakage"):
        display(figure)

# %% [markdown]
# ## A defence by hand
#
# Defences are functions of a key and a gradient, and compose.

# %%
import jax

from softinv_jax.client.defences import Clipping, GaussianNoise, apply_defences, global_norm

gradient = jax.tree.map(np.ones_like, dict(system.parameters))
sent = apply_defences(jax.random.key(SEED), gradient, [Clipping(1.0), GaussianNoise(1e-3)])
print("norm before", float(global_norm(gradient)), "and after", float(global_norm(sent)))

# %%
# What this notebook claims.
assert result.baseline.certain.count == CLIENTS
claims = [cell.wrong.count for _, cells in result.sweeps for cell in cells]
assert sum(claims) <= 0.02 * CLIENTS * len(claims)
