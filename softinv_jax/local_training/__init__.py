"""The client's whole computation, run by the observer: several local steps, solved for the example behind them."""
