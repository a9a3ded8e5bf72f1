"""Quality budgets: search, levers, save points, and the bytes that each layer gets."""
