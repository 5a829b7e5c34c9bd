"""The paper's tasks: samples -> scores per item. The perception tasks go from features to scores per source, POPE and MME from answers to
scores per subset."""
