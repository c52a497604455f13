"""What a training stands on, whatever it trains: both parts use it, it knows neither."""
