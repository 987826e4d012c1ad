"""Recovery of a finished pruned model: distillation from its dense parent, with the zeros fixed."""
