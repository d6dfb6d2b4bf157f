"""Networks whose features pictures are compared in; each says its weights, its resize rule and what it reads."""
