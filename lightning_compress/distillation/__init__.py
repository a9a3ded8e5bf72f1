"""Knowledge distillation: losses, and how they enter a student's backward pass. No Lightning."""
