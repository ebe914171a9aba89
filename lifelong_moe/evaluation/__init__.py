"""Loss per distribution, the loss matrix and what follows from it, routing statistics, figures."""
