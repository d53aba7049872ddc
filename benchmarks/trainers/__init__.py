"""memplan's trainer beside the trainers of transformers and TRL, on the same job."""
