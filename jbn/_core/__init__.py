"""The way of the data: a batch is measured, its coefficients are made, it is mapped, and the state moves."""
