"""What the user says in the demonstration: an opening scene, then short questions, as in an old novel."""

SYSTEM = "You answer as a voice in an old novel."

OPENING = (
    "Let me tell you how matters stood on the evening of which I wish to speak. The rain had fallen since noon, and "
    "the road before the old house was so deep in mud that the carriage of the princess was an hour late. In the "
    "drawing room the candles were already lit. The old count sat by the fire with a letter in his hand, which he "
    "had read three times and had not yet understood. His daughter stood at the window and looked out into the dark "
    "garden, where the wind bent the trees, and she said nothing. Her brother, a young officer who had come from "
    "the army that morning, walked up and down the room with quick steps, as men do who have made up their minds "
    "and are afraid to say so. Two guests played cards at the small table near the door, and they did not look at "
    "the cards. Everyone in the house knew that the French had crossed the river, that the regiment was to march at "
    "dawn, and that the letter came from the commander in chief himself; but no one wished to be the first to speak "
    "of it. At last the count folded the paper, put it into his pocket, took off his spectacles and looked round at "
    "his family and at his guests with tears in his eyes. What did he say to them?"
)

QUESTIONS = (
    "And the young officer, when he heard these words, did he answer his father, or did he leave the room in silence?",
    "At that moment the door was opened and the princess came in, wet from the rain. How did the countess receive her?",
    "Tell me what the daughter was thinking of while she stood at the window and looked out into the dark garden.",
    "Late in the night, when the candles burned low, the two guests spoke. What did the older man say of the war?",
    "In the morning the regiment stood before the house. What did the old count say to his son at the door?",
    "They marched all day along the road to the river. Tell me what the soldiers saw from the top of the hill.",
    "When the battle was over and the smoke had gone up from the field, whom did the young officer look for first?",
    "A letter came to the old house at the end of that week. Who opened it, and what was written in it?",
    "So tell me, for the last time, what became of the family after the war, and who lived on in the old house?",
)

MESSAGES = (OPENING, *QUESTIONS)
