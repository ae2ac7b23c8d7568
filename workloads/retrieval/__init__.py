"""The service that proposes candidates: ANN, item-to-item, lexical, popular."""
