"""What a projection costs: time against a memory copy and against PEFT, memory, and their growth with D and d."""
