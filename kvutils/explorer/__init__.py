"""The explorer of JupyterLab: one picture or two, or two models on one; similarity, attention, questions, interventions."""
