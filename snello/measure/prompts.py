"""Prompts that we ship: for the text a model writes itself, and for the looping and ending rates.

Everyday requests of different kinds, so that a chat model answers as it does at work; a base model goes on
from them as from any text. Changing one changes every self-written text, so the list is part of the recorded
text hash.
"""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "Explain to a twelve-year-old why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Summarize the main causes of the First World War in one paragraph.",
    "Give me a recipe for a vegetable soup for four people.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "What are the advantages and drawbacks of working from home?",
    "Write a polite e-mail asking a landlord to repair a leaking tap.",
    "Describe how a bill becomes a law.",
    "A train leaves at 14:20 and arrives at 17:05. How long is the journey? Show your steps.",
    "List ten things to pack for a week of hiking in the mountains.",
    "Translate into French: The meeting has been moved to Thursday morning.",
    "Compare the novels of Charles Dickens and Jane Austen.",
    "How do vaccines work?",
    "Write a product description for a pair of waterproof boots.",
    "What should I look for when I buy a used car?",
    "Explain the difference between a process and a thread.",
    "Write a dialogue between a doctor and a patient who sleeps badly.",
    "Give three arguments for and three against a tax on sugar.",
    "Describe the life of a honey bee from egg to death.",
    "Write an SQL query that lists the five customers with the highest total orders.",
    "Plan a three-day visit to Rome for a family with small children.",
    "Explain compound interest with an example.",
    "Once upon a time, in a village at the edge of a great forest,",
    "The history of the printing press begins",
    "Write a letter of complaint about a parcel that arrived damaged.",
    "What happens in the body during exercise?",
    "Draft the minutes of a short team meeting about a delayed release.",
    "Explain how a refrigerator keeps food cold.",
    "Write a poem of three stanzas about the first snow.",
    "How can a small shop attract more customers?",
    "Describe the water cycle.",
    "Write a news report about a bridge that was opened today.",
)
