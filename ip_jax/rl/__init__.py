"""Policy-gradient reinforcement learning with separate generation and training prompts: rollout ->
reward -> gate -> swap -> step.
"""
