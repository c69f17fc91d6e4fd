"""What several tests are made of: tiny models, conversations, stores, and harnesses that break them."""
