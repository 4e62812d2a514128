"""What is wrong with this machine or this appliance: checks with verdicts, a cause and a remedy each."""
