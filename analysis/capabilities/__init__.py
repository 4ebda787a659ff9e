"""What a user of PEFT, Transformers, TRL and Accelerate can do with a uniproj adapter, found out by doing it."""
