"""ESM2 protein embeddings as perturbation features for Arc Institute's State model: the parts.

The two commands, create_esm_pert_features.py and train_with_esm_features.py, stand beside this
folder; no module of it imports them.
"""

__version__ = "0.1.0"
