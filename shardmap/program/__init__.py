"""The recording of one sample as frozen data: the program, and facts about its operators."""
