"""What plugin authors and this project's own tests share: servers, strategies, judges."""
