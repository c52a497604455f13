"""What a training run stands on, whatever it trains: both parts use it, it knows neither."""
