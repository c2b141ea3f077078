"""Trainable tokens: some rows of an embedding are trained, and what is tied to it has the same ones.

The rows stand for the base's and are not added to them: those by which a vocabulary has grown are other random ones in
every process. PEFT's TrainableTokensConfig, and the same beside other methods (`trainable_token_indices`).
"""
