"""`e2llm chat`: a conversation in the terminal over a serving engine in this process."""
