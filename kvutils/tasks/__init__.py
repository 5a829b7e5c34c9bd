"""The paper's tasks: samples -> scores per item. The six perception tasks of section 3.1 go from features to scores per source, the
question tasks (POPE, MME) from answers to scores per subset."""
