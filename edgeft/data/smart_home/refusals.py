"""Requests that a smart home cannot serve; the answer is always the same call with action "unsupported"."""

from __future__ import annotations

from edgeft.data.smart_home.vocabulary import PerSplit

REQUESTS: PerSplit = {
    "train": (
        "order a pizza", "order some sushi for tonight", "what's the weather like", "will it rain today",
        "tell me a joke",
        "tell me a story", "call my mother", "call the doctor", "send a text to anna", "send an email to my boss",
        "book a flight to paris", "book a table for two", "buy more milk", "buy a birthday present", "feed the cat",
        "feed the fish", "walk the dog", "water the plants", "mow the lawn", "wash the dishes", "do the laundry",
        "iron my shirts", "paint the kitchen walls", "paint the fence", "fix the roof", "repair the sink",
        "clean the windows", "make the bed", "cook dinner", "bake a cake", "write a poem", "write my essay",
        "translate this into french", "what is the capital of spain", "who won the match", "how tall is mount everest",
        "what time is it in tokyo", "what's the news", "read me the news", "play chess with me", "sing me a song",
        "find my keys", "find my phone", "where did i park", "start the car", "charge the car", "drive me to work",
        "call a taxi", "order a taxi for eight", "pay the electricity bill", "transfer fifty dollars to tom",
        "how much money do i have", "add eggs to the shopping list", "remind me to buy bread", "what's on my calendar",
        "move my meeting to monday", "take a selfie", "take a picture of the kitchen", "print the report",
        "open the spreadsheet", "install an update", "download a movie", "recommend a book", "how do i boil an egg",
        "calculate twelve times nine", "what's twenty percent of eighty", "flip a coin", "roll a die",
        "how old are you", "what's your name", "do you love me", "are you a robot", "vote for me",
        "fill the bathtub with champagne", "warm up the sofa", "polish the silver", "take out the trash",
        "empty the mailbox", "sign for the package", "pick up the kids", "wake up my brother", "build a tree house",
        "dance with me", "teach me italian", "check my homework", "solve this riddle", "scratch my back",
        "hide the presents", "chop the onions", "teleport me to the office", "make the bedroom bigger",
        "change the colour of the sky", "turn the sun off", "turn down the neighbours", "turn on my brain",
        "open a bank account", "close the deal", "lock up the thief", "start a revolution", "stop the rain",
        "set the table", "set a world record", "raise my salary", "lower the taxes",
    ),
    "valid": (
        "order a burger", "what's the temperature in rome", "tell me a riddle", "call my sister", "book a hotel",
        "feed the dog", "sweep the chimney", "who wrote hamlet", "sell my car", "open a bottle of wine",
        "turn the moon off", "set up a meeting", "draw a horse", "vaccinate the cat",
    ),
    "test": (
        "order chinese food", "is it going to snow", "tell me a fun fact", "call the police",
        "send a letter to grandma",
        "book a train to berlin", "buy new shoes", "feed the hamster", "wash my car", "plant some roses",
        "who is the president", "what is the square root of nine", "find my glasses", "play football with me",
        "pay the rent", "add butter to my shopping list", "write a song", "knit a sweater", "fold the towels",
        "turn lead into gold", "open my heart", "set the dog free", "close my bank account", "lower the prices",
    ),
}  # fmt: skip

FRAMES: PerSplit = {
    "train": (
        "{q}", "{q}", "{q}", "please {q}", "hey, {q}", "can you {q}", "i want you to {q}", "could you {q}", "{q} now",
        "{q} please", "ok, {q}", "{q} for me", "i need you to {q}", "just {q}",
    ),
    "valid": ("{q} thank you", "alright, {q}", "quickly {q}"),
    "test": ("hello, {q}", "would you mind, {q}", "i'd like you to {q}", "{q} right away"),
}  # fmt: skip
